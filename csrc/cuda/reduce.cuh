// Sums over a block in a fixed order: the same input gives the same bits.
#pragma once
#include "cuda/tiles.cuh"
#include "math/reduction.h"

namespace mlloss::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarps = kThreads / 32;

// Combines the values of all threads; the result is valid in thread 0. `combine` is associative and
// commutative, `shuffle` gives the value of the lane whose number differs in the bits of `lanes`.
template <class T, class Combine, class Shuffle>
__device__ __forceinline__ T block_reduce(T value, T* warps, Combine combine, Shuffle shuffle) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = combine(value, shuffle(value, lanes));
  __syncthreads();  // `warps` may still be read by an earlier reduction
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) value = combine(value, warps[warp]);
  }
  return value;
}

__device__ __forceinline__ double block_sum(double value, double* warps) {
  return block_reduce(
      value, warps, [](double a, double b) { return a + b; },
      [](double a, int lanes) { return __shfl_xor_sync(kFullWarp, a, lanes); });
}

// ---- Sums over the grid ----

struct PartialSum {
  double total;        // sum of mask * weight * L
  double denominator;  // what the reduction divides by, as far as it has to be counted
};

// Blocks of a pass with a partial sum per block. Fixed, so that sums do not depend on the GPU;
// enough to fill any.
constexpr int64_t kReductionBlocks = 2048;
// Blocks of a pass without partial sums; more units are looped over.
constexpr int64_t kMaxBlocks = 65536;

inline dim3 grid_of(int64_t units, int64_t most) {
  const int64_t blocks = units < most ? units : most;
  return dim3(static_cast<unsigned>(blocks > 0 ? blocks : 1));
}

// Adds up the partial sums in order and divides: one block. Where `loss` is nullptr, only the scale
// is written.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    finish_reduction(const Reduction reduction, const int64_t batch,
                     const double* __restrict__ normalizer,   // 0-d
                     const PartialSum* __restrict__ partial,  // [blocks]
                     const int blocks,
                     const double known,          // part of the denominator that was not counted
                     Real* __restrict__ loss,     // 0-d or nullptr
                     double* __restrict__ scale)  // 0-d
{
  MLLOSS_SHARED_ARRAY(double, warps, kWarps);
  double total = 0, counted = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) {
    total += partial[i].total;
    counted += partial[i].denominator;
  }
  total = block_sum(total, warps);
  counted = block_sum(counted, warps) + known;
  if (threadIdx.x != 0) return;
  const double denominator = denominator_of(reduction, counted, batch, normalizer);
  *scale = scale_of(denominator);
  if (loss != nullptr) *loss = static_cast<Real>(denominator == 0 ? 0 : total / denominator);
}

template <class Real>
cudaError_t launch_finish(const Problem& problem, const PartialSum* partial, dim3 grid,
                          const ForwardOutput& output, cudaStream_t stream) {
  auto* loss = problem.reduction == Reduction::kNone ? nullptr : static_cast<Real*>(output.loss);
  return MLLOSS_LAUNCH((finish_reduction<Real>), dim3(1), dim3(kThreads), stream, problem.reduction,
                       problem.batch, problem.normalizer, partial, static_cast<int>(grid.x), 0.0,
                       loss, output.scale);
}

// The scale alone, before the loss is known, of a denominator that is `known` or that partial sums
// have counted.
inline cudaError_t launch_scale(const Problem& problem, const PartialSum* partial, int blocks,
                                double known, double* scale, cudaStream_t stream) {
  return MLLOSS_LAUNCH((finish_reduction<float>), dim3(1), dim3(kThreads), stream,
                       problem.reduction, problem.batch, problem.normalizer, partial, blocks, known,
                       static_cast<float*>(nullptr), scale);
}

}  // namespace mlloss::cuda
