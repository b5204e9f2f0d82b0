// Sigmoid cross-entropy on the GPU.
#include "math/sigmoid_cross_entropy.h"

#include "cuda/kernels.h"
#include "cuda/pointwise.cuh"

namespace mlloss::cuda {

int64_t sigmoid_cross_entropy_workspace(const PointwiseProblem&) { return kPointwiseWorkspace; }

cudaError_t sigmoid_cross_entropy_forward(const PointwiseProblem& problem, double label_smoothing,
                                          const ForwardOutput& output, void* workspace,
                                          cudaStream_t stream) {
  return dispatch_logits(problem.element, [&](auto scalar) {
    using Scalar = typename decltype(scalar)::Type;
    using Loss = SigmoidCrossEntropy<typename Arithmetic<Scalar>::Real>;
    return launch_pointwise_forward<Loss, Scalar>(problem, Loss::with_smoothing(label_smoothing),
                                                  output, workspace, stream);
  });
}

cudaError_t sigmoid_cross_entropy_backward(const PointwiseProblem& problem, double label_smoothing,
                                           const BackwardInput& input, const BackwardOutput& output,
                                           cudaStream_t stream) {
  return dispatch_logits(problem.element, [&](auto scalar) {
    using Scalar = typename decltype(scalar)::Type;
    using Loss = SigmoidCrossEntropy<typename Arithmetic<Scalar>::Real>;
    return launch_pointwise_backward<Loss, Scalar>(problem, Loss::with_smoothing(label_smoothing),
                                                   input, output, stream);
  });
}

}  // namespace mlloss::cuda
