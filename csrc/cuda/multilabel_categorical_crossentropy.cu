// Multi-label categorical cross-entropy (ZLPR) on the GPU.
#include "math/multilabel_categorical_crossentropy.h"

#include "cuda/kernels.h"
#include "cuda/rowwise.cuh"

namespace mlloss::cuda {

int64_t multilabel_categorical_crossentropy_workspace(const RowwiseProblem& problem) {
  return rowwise_workspace(problem);
}

cudaError_t multilabel_categorical_crossentropy_forward(const RowwiseProblem& problem,
                                                        const ForwardOutput& output,
                                                        void* workspace, cudaStream_t stream) {
  return dispatch_logits(problem.element, [&](auto scalar) {
    using Scalar = typename decltype(scalar)::Type;
    return launch_rowwise_forward<MultilabelCategoricalCrossentropy, Scalar>(problem, output,
                                                                             workspace, stream);
  });
}

cudaError_t multilabel_categorical_crossentropy_backward(const RowwiseProblem& problem,
                                                         const BackwardInput& input,
                                                         const BackwardOutput& output,
                                                         cudaStream_t stream) {
  return dispatch_logits(problem.element, [&](auto scalar) {
    using Scalar = typename decltype(scalar)::Type;
    return launch_rowwise_backward<MultilabelCategoricalCrossentropy, Scalar>(problem, input,
                                                                              output, stream);
  });
}

}  // namespace mlloss::cuda
