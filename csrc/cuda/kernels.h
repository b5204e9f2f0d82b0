// The launchers of the CUDA kernels, one source file per loss: cuda::<loss>::forward and
// cuda::<loss>::backward; cuda::rescale and cuda::optimizer_step. They take pointers to device
// memory, enqueue on `stream` and never synchronise.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "losses.h"
#include "problem.h"

namespace mlloss::cuda {

// workspace: bytes of device memory that forward needs as `scratch`; contents do not matter.
#define MLLOSS_DECLARE(name, Problem)                                                     \
  namespace name {                                                                        \
  int64_t workspace(const Problem& problem);                                              \
  cudaError_t forward(const Problem& problem, const ForwardOutput& output, void* scratch, \
                      cudaStream_t stream);                                               \
  cudaError_t backward(const Problem& problem, const BackwardInput& input,                \
                       const BackwardOutput& output, cudaStream_t stream);                \
  }
#define MLLOSS_DECLARE_POINTWISE(name, ...) MLLOSS_DECLARE(name, PointwiseProblem)
#define MLLOSS_DECLARE_ROWWISE(name, ...) MLLOSS_DECLARE(name, RowwiseProblem)

MLLOSS_POINTWISE_LOSSES(MLLOSS_DECLARE_POINTWISE)
MLLOSS_ROWWISE_LOSSES(MLLOSS_DECLARE_ROWWISE)
MLLOSS_ROW_SUMS(MLLOSS_DECLARE_ROWWISE)  // forward alone

#undef MLLOSS_DECLARE_ROWWISE
#undef MLLOSS_DECLARE_POINTWISE
#undef MLLOSS_DECLARE

cudaError_t rescale(RescaleProblem problem, cudaStream_t stream);
cudaError_t optimizer_step(const StepProblem& problem, cudaStream_t stream);

}  // namespace mlloss::cuda
