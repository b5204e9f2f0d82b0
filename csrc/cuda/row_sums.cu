// The two sums of rows alone, on the GPU.
#include "math/row_sums.h"

#include "cuda/kernels.h"
#include "cuda/rowwise.cuh"

namespace mlloss::cuda::row_sums {

int64_t workspace(const RowwiseProblem& problem) { return rowwise_workspace(problem); }

cudaError_t forward(const RowwiseProblem& problem, const ForwardOutput& output, void* scratch,
                    cudaStream_t stream) {
  return dispatch_logits(problem.element, [&](auto scalar) {
    using Scalar = typename decltype(scalar)::Type;
    return launch_rowwise_losses<RowSumsAlone, Scalar>(problem, output, scratch, stream);
  });
}

}  // namespace mlloss::cuda::row_sums
