// The launchers of the CUDA kernels, one source file per loss. They take pointers to device memory,
// enqueue on `stream` and never synchronise.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "problem.h"

namespace mlloss::cuda {

// Bytes of device memory that a forward launcher needs as `workspace`; contents do not matter.
int64_t sigmoid_cross_entropy_workspace(const PointwiseProblem& problem);
int64_t multilabel_categorical_crossentropy_workspace(const RowwiseProblem& problem);

cudaError_t sigmoid_cross_entropy_forward(const PointwiseProblem& problem, double label_smoothing,
                                          const ForwardOutput& output, void* workspace,
                                          cudaStream_t stream);
cudaError_t sigmoid_cross_entropy_backward(const PointwiseProblem& problem, double label_smoothing,
                                           const BackwardInput& input, const BackwardOutput& output,
                                           cudaStream_t stream);

cudaError_t multilabel_categorical_crossentropy_forward(const RowwiseProblem& problem,
                                                        const ForwardOutput& output,
                                                        void* workspace, cudaStream_t stream);
cudaError_t multilabel_categorical_crossentropy_backward(const RowwiseProblem& problem,
                                                         const BackwardInput& input,
                                                         const BackwardOutput& output,
                                                         cudaStream_t stream);

}  // namespace mlloss::cuda
