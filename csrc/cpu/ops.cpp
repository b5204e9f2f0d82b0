// The CPU operators: torch's tensors in, kernels of kernels.h called.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "operators.h"
#include "torch_tensor.h"

namespace mlloss {
namespace {

struct CpuBackend : TorchTensors {
  static void sigmoid_cross_entropy_forward(const Tensor&, const PointwiseProblem& problem,
                                            double label_smoothing, const ForwardOutput& output) {
    cpu::sigmoid_cross_entropy_forward(problem, label_smoothing, output);
  }

  static void sigmoid_cross_entropy_backward(const Tensor&, const PointwiseProblem& problem,
                                             double label_smoothing, const BackwardInput& input,
                                             const BackwardOutput& output) {
    cpu::sigmoid_cross_entropy_backward(problem, label_smoothing, input, output);
  }

  static void multilabel_categorical_crossentropy_forward(const Tensor&,
                                                          const RowwiseProblem& problem,
                                                          const ForwardOutput& output) {
    cpu::multilabel_categorical_crossentropy_forward(problem, output);
  }

  static void multilabel_categorical_crossentropy_backward(const Tensor&,
                                                           const RowwiseProblem& problem,
                                                           const BackwardInput& input,
                                                           const BackwardOutput& output) {
    cpu::multilabel_categorical_crossentropy_backward(problem, input, output);
  }
};

using Cpu = Operators<CpuBackend>;

}  // namespace
}  // namespace mlloss

STABLE_TORCH_LIBRARY_IMPL(mlloss_cuda, CPU, m) {
  using mlloss::Cpu;
  m.impl("sigmoid_cross_entropy_out", TORCH_BOX(&Cpu::sigmoid_cross_entropy_out));
  m.impl("sigmoid_cross_entropy_backward_out", TORCH_BOX(&Cpu::sigmoid_cross_entropy_backward_out));
  m.impl("multilabel_categorical_crossentropy_out",
         TORCH_BOX(&Cpu::multilabel_categorical_crossentropy_out));
  m.impl("multilabel_categorical_crossentropy_backward_out",
         TORCH_BOX(&Cpu::multilabel_categorical_crossentropy_backward_out));
}
