// Multiplication of a gradient that was written together with the loss, on the GPU.
//
// Bytes per element, s = size of an element: 2 s, or 0 where the factor is 1, which each block
// finds out by itself: nothing waits for the GPU. Expected limit: memory. Not measured on a GPU
// yet.
#include "math/rescale.h"

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace mlloss::cuda {
namespace {

constexpr int kRescaleThreads = 256;
constexpr int kVectorsPerThread = 4;  // loads in flight
constexpr int64_t kRescaleBlocks = 1 << 14;

// Positions (vector.cuh) of a row that a block handles at a time.
template <class Scalar>
constexpr int64_t kRescaleSpan = int64_t(kRescaleThreads) * kVectorsPerThread * kWidth<Scalar>;

template <class Scalar>
__global__ void __launch_bounds__(kRescaleThreads)
    rescale_kernel(const RescaleProblem problem, int64_t spans_per_row) {
  using Real = typename Arithmetic<Scalar>::Real;
  constexpr int kCount = kWidth<Scalar>;
  using Elements = Vector<Scalar, kCount>;
  const double upstream =
      problem.grad_output_element == Element::kDouble
          ? *static_cast<const double*>(problem.grad_output)
          : static_cast<double>(*static_cast<const float*>(problem.grad_output));
  const double factor = rescaling_factor(upstream, problem.gradient_scale);
  if (factor == 1) return;
  const Real multiplier = static_cast<Real>(factor);

  for (int64_t span = blockIdx.x; span < problem.rows * spans_per_row; span += gridDim.x) {
    Scalar* row =
        static_cast<Scalar*>(problem.gradient) + span / spans_per_row * problem.row_stride;
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(Scalar) % kCount);
    const int64_t first = span % spans_per_row * kRescaleSpan<Scalar> - shift;
    const auto column_of = [&](int k) {
      return first + (k * kRescaleThreads + static_cast<int>(threadIdx.x)) * kCount;
    };
    const auto is_whole = [&](int64_t column) {
      return column >= 0 && column + kCount <= problem.columns;
    };
    Elements values[kVectorsPerThread];
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      if (is_whole(column_of(k))) values[k].load(row + column_of(k));
    }
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      const int64_t column = column_of(k);
      if (is_whole(column)) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          from_real(rescaled(to_real(values[k].element[i]), multiplier), &values[k].element[i]);
        }
        values[k].store(row + column);
        continue;
      }
      for (int i = 0; i < kCount; ++i) {
        if (column + i < 0 || column + i >= problem.columns) continue;
        from_real(rescaled(to_real(row[column + i]), multiplier), row + column + i);
      }
    }
  }
}

}  // namespace

cudaError_t rescale(RescaleProblem problem, cudaStream_t stream) {
  if (problem.grad_output_element != Element::kFloat &&
      problem.grad_output_element != Element::kDouble) {
    return cudaErrorInvalidValue;  // losses are fp32 or fp64, and so is what comes from above
  }
  flatten(problem);
  return dispatch_logits(problem.element, [&](auto scalar) {
    using Scalar = typename decltype(scalar)::Type;
    // A row may begin in the middle of a vector.
    const int64_t positions = problem.columns + kWidth<Scalar> - 1;
    const int64_t spans_per_row = (positions + kRescaleSpan<Scalar> - 1) / kRescaleSpan<Scalar>;
    const int64_t blocks = std::min(problem.rows * spans_per_row, kRescaleBlocks);
    return MLLOSS_LAUNCH((rescale_kernel<Scalar>), dim3(static_cast<unsigned>(blocks)),
                         dim3(kRescaleThreads), stream, problem, spans_per_row);
  });
}

}  // namespace mlloss::cuda
