// Binary cross-entropy of probabilities on the CPU.
#include "math/binary_cross_entropy.h"

#include "cpu/kernels.h"
#include "cpu/pointwise.h"

namespace mlloss::cpu {

// For hard targets.
template <>
struct VectorLoss<BinaryCrossEntropy<float>> {
  using Loss = BinaryCrossEntropy<float>;
  static constexpr bool kExists = true;

  static Factors factors_of(const PointwiseTile<float>& tile) {
    return {tile.weight, tile.has_parameters ? tile.parameters[0] : nullptr};
  }

  static bool sum(const VectorKernels& vector, const Loss& loss, const PointwiseTile<float>& tile,
                  LossSum* sum) {
    if (tile.labels.kind == TargetKind::kSoft) return false;
    vector.probability_sum(tile, factors_of(tile), {loss.eps, loss.most, loss.least}, sum);
    return true;
  }

  static bool gradients(const VectorKernels& vector, const Loss& loss,
                        const PointwiseTile<float>& tile, float scale, bool stream,
                        void* gradients) {
    if (tile.labels.kind == TargetKind::kSoft) return false;
    vector.probability_gradients(tile, factors_of(tile), {loss.eps, loss.most, loss.least}, scale,
                                 stream, gradients);
    return true;
  }
};

}  // namespace mlloss::cpu

MLLOSS_POINTWISE_KERNELS(binary_cross_entropy, BinaryCrossEntropy)
