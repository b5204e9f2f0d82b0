// Asymmetric loss on the CPU.
#include "math/asymmetric_loss.h"

#include "cpu/kernels.h"
#include "cpu/pointwise.h"

namespace mlloss::cpu {

// For hard targets and whole powers.
template <>
struct VectorLoss<AsymmetricLoss<float>> {
  using Loss = AsymmetricLoss<float>;
  static constexpr bool kExists = true;

  static bool takes(const Loss& loss, const PointwiseTile<float>& tile) {
    return tile.labels.kind != TargetKind::kSoft && loss.negative_power.fraction == 0 &&
           loss.positive_power.fraction == 0;
  }
  static AsymmetricConstants constants_of(const Loss& loss) {
    const auto whole = [](const auto& power) {
      return WholePower{power.ones, power.twos, power.fours};
    };
    return {whole(loss.negative_power),
            whole(loss.positive_power),
            loss.negative_slope,
            loss.positive_slope,
            loss.clip,
            loss.rest,
            loss.logit_high,
            loss.logit_low};
  }

  static bool sum(const VectorKernels& vector, const Loss& loss, const PointwiseTile<float>& tile,
                  LossSum* sum) {
    if (!takes(loss, tile)) return false;
    vector.asymmetric_sum(tile, {tile.weight, nullptr}, constants_of(loss), sum);
    return true;
  }

  static bool gradients(const VectorKernels& vector, const Loss& loss,
                        const PointwiseTile<float>& tile, float scale, bool stream,
                        void* gradients) {
    if (!takes(loss, tile)) return false;
    vector.asymmetric_gradients(tile, {tile.weight, nullptr}, constants_of(loss), scale, stream,
                                gradients);
    return true;
  }
};

}  // namespace mlloss::cpu

MLLOSS_POINTWISE_KERNELS(asymmetric_loss, AsymmetricLoss)
