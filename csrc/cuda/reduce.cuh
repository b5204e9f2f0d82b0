// Sums over a block in a fixed order: the same input gives the same bits.
#pragma once
#include "cuda/tiles.cuh"

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

}  // namespace mlloss::cuda
