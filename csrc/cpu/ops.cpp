// The CPU operators: torch's tensors in, kernels of kernels.h called.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "operators.h"
#include "torch_tensor.h"

namespace mlloss {
namespace {

#define MLLOSS_KERNELS(name, ...)                                                             \
  struct name##_kernels : TorchTensors {                                                      \
    template <class Problem>                                                                  \
    static void forward(const Tensor&, const Problem& problem, const ForwardOutput& output) { \
      cpu::name::forward(problem, output);                                                    \
    }                                                                                         \
    template <class Problem>                                                                  \
    static void backward(const Tensor&, const Problem& problem, const BackwardInput& input,   \
                         const BackwardOutput& output) {                                      \
      cpu::name::backward(problem, input, output);                                            \
    }                                                                                         \
  };

struct rescale_kernel : TorchTensors {
  static void rescale(const Tensor&, const RescaleProblem& problem) { cpu::rescale(problem); }
};

struct step_kernel : TorchTensors {
  static void optimizer_step(const Tensor&, const StepProblem& problem) {
    cpu::optimizer_step(problem);
  }
};

MLLOSS_POINTWISE_LOSSES(MLLOSS_KERNELS)
MLLOSS_ROWWISE_LOSSES(MLLOSS_KERNELS)
MLLOSS_ROW_SUMS(MLLOSS_KERNELS)
MLLOSS_POINTWISE_LOSSES(MLLOSS_POINTWISE_OPERATORS)
MLLOSS_ROWWISE_LOSSES(MLLOSS_ROWWISE_OPERATORS)
MLLOSS_ROW_SUMS(MLLOSS_ROWWISE_OPERATORS)

}  // namespace
}  // namespace mlloss

STABLE_TORCH_LIBRARY_IMPL(mlloss_cuda, CPU, m) {
#define MLLOSS_REGISTER(name, ...)                                             \
  m.impl(#name "_out", TORCH_BOX(&mlloss::name##_operators::forward));         \
  m.impl(#name "_inplace_out", TORCH_BOX(&mlloss::name##_operators::inplace)); \
  m.impl(#name "_backward_out", TORCH_BOX(&mlloss::name##_operators::backward));
  MLLOSS_POINTWISE_LOSSES(MLLOSS_REGISTER)
  MLLOSS_ROWWISE_LOSSES(MLLOSS_REGISTER)
#undef MLLOSS_REGISTER
  m.impl("row_sums_out", TORCH_BOX(&mlloss::row_sums_operators::forward));
  m.impl("optimizer_step_", TORCH_BOX(&mlloss::StepOperator<mlloss::step_kernel>::step));
  m.impl("rescale_", TORCH_BOX(&mlloss::RescaleOperator<mlloss::rescale_kernel>::rescale));
}
