// Sigmoid focal loss on the CPU.
#include "math/sigmoid_focal_loss.h"

#include "cpu/kernels.h"
#include "cpu/pointwise.h"

namespace mlloss::cpu {

// For hard targets and constants that are the same for all elements, with a whole gamma.
template <>
struct VectorLoss<SigmoidFocalLoss<float>> {
  using Loss = SigmoidFocalLoss<float>;
  static constexpr bool kExists = true;

  static bool takes(const Loss& loss, const PointwiseTile<float>& tile) {
    return tile.labels.kind != TargetKind::kSoft && !tile.has_parameters &&
           loss.power.fraction == 0;
  }
  static FocalConstants constants_of(const Loss& loss) {
    return {loss.positive_offset,
            loss.negative_offset,
            loss.power.exponent,
            {loss.power.ones, loss.power.twos, loss.power.fours}};
  }

  static bool sum(const VectorKernels& vector, const Loss& loss, const PointwiseTile<float>& tile,
                  LossSum* sum) {
    if (!takes(loss, tile)) return false;
    vector.focal_sum(tile, {tile.weight, nullptr}, constants_of(loss), sum);
    return true;
  }

  static bool gradients(const VectorKernels& vector, const Loss& loss,
                        const PointwiseTile<float>& tile, float scale, bool stream,
                        void* gradients) {
    if (!takes(loss, tile)) return false;
    vector.focal_gradients(tile, {tile.weight, nullptr}, constants_of(loss), scale, stream,
                           gradients);
    return true;
  }
};

}  // namespace mlloss::cpu

MLLOSS_POINTWISE_KERNELS(sigmoid_focal_loss, SigmoidFocalLoss)
