#include <cstdint>

#include "cuda/portability.cuh"
#include "selftest.h"

namespace mlloss::selftest {
namespace {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarps = kThreads / 32;
constexpr int kBitmapWords = 32;

__device__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) {
    value += __shfl_xor_sync(kFullMask, value, distance);
  }
  return value;
}

// Valid in warp 0.
__device__ float block_sum(float value, Fault fault) {
  MLLOSS_SHARED_ARRAY(float, partial, kWarps);
  const int warp = threadIdx.x / 32;
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) {
    if (fault == Fault::shared_index_out_of_bounds) {
      partial[warp + 1] = value;
    } else if (fault == Fault::shared_write_out_of_bounds) {
      float* unchecked = partial;
      unchecked[warp + 1] = value;
    } else {
      partial[warp] = value;
    }
  }
  // Lanes 0 to 30 wait for lane 31, which waits for them at the barrier of the whole block.
  if (fault == Fault::unreachable_barrier && threadIdx.x < 31) __syncwarp();
  if (fault == Fault::different_barriers && warp == 0) {
    __syncthreads();
  } else if (fault != Fault::missing_barrier) {
    __syncthreads();
  }
  return warp_sum(threadIdx.x < kWarps ? partial[threadIdx.x] : 0.0f);
}

// values [count], partials [gridDim.x], tickets [1], result [1].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const T* __restrict__ values, float* __restrict__ partials,
               unsigned* __restrict__ tickets, float* __restrict__ result, int64_t count,
               Fault fault) {
  MLLOSS_SHARED_ARRAY(bool, is_last, 1);
  const int64_t end = count + (fault == Fault::global_read_out_of_bounds ? 1 : 0);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  float sum = 0.0f;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < end; i += stride) {
    sum += static_cast<float>(values[i]);
  }
  sum = block_sum(sum, fault);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
    if (fault != Fault::missing_fence) __threadfence();
    is_last[0] = atomicAdd(tickets, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0]) return;
  sum = 0.0f;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) sum += __ldcs(partials + i);
  __syncthreads();  // block_sum uses its shared array again
  sum = block_sum(sum, Fault::none);
  if (threadIdx.x == 0) *result = sum;
}

__global__ void __launch_bounds__(kThreads)
    count_distinct_kernel(const int* __restrict__ labels, int count, int* __restrict__ result,
                          Fault fault) {
  MLLOSS_SHARED_ARRAY(unsigned, bitmap, kBitmapWords);
  if (threadIdx.x < kBitmapWords) bitmap[threadIdx.x] = 0;
  if (fault != Fault::missing_barrier) __syncthreads();
  bool has_any = false;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    atomicOr(&bitmap[labels[i] / 32], 1u << labels[i] % 32);
    has_any = true;
  }
  if (!__syncthreads_or(has_any)) {
    if (threadIdx.x == 0) *result = 0;
    return;
  }
  if (threadIdx.x >= 32) return;
  const int distinct = __reduce_add_sync(kFullMask, __popc(bitmap[threadIdx.x]));
  if (threadIdx.x == 0) *result = distinct;
}

__global__ void __launch_bounds__(kThreads)
    reverse_in_blocks_kernel(const float* __restrict__ values, float* __restrict__ reversed,
                             int count, Fault fault) {
  MLLOSS_SHARED_ARRAY(float, tile, kThreads);
  const int first = blockIdx.x * kThreads;
  const int in_tile = min(count - first, kThreads);
  const int i = threadIdx.x;
  if (i >= in_tile) return;
  tile[i] = values[first + i];
  if (fault != Fault::missing_barrier) __syncthreads();
  reversed[first + i] = tile[in_tile - 1 - i];
}

__global__ void __launch_bounds__(kThreads)
    reverse_in_warps_kernel(const float* __restrict__ values, float* __restrict__ reversed,
                            int count, Fault fault) {
  MLLOSS_SHARED_ARRAY(float, tile, kThreads);
  const int first = blockIdx.x * kThreads;
  const int i = threadIdx.x;
  if (first + i >= count) return;
  tile[i] = values[first + i];
  if (fault != Fault::missing_warp_barrier) __syncwarp();
  reversed[first + i] = tile[i ^ 31];
}

__global__ void warp_intrinsics_kernel(const int* __restrict__ values, int* __restrict__ results,
                                       Fault fault) {
  const int lane = threadIdx.x;
  const int value = values[lane];
  int prefix = value;
  for (int distance = 1; distance < 32; distance <<= 1) {
    const int before = __shfl_up_sync(kFullMask, prefix, distance);
    if (lane >= distance) prefix += before;
  }
  results[lane] = prefix;
  switch (fault) {
    case Fault::different_intrinsics:
      if (lane < 16) {
        __ballot_sync(kFullMask, 1);
      } else {
        __syncwarp();
      }
      break;
    case Fault::different_masks:
      __shfl_xor_sync(lane < 16 ? kFullMask : kFullMask - 1, value, 1);
      break;
    case Fault::lane_outside_its_mask:
      __ballot_sync(0x0000ffffu, 1);
      break;
    case Fault::read_from_outside_mask:
      if (lane < 16) __shfl_down_sync(0x0000ffffu, value, 8);
      break;
    case Fault::read_from_returned_lane:
      if (lane == 31) return;
      __shfl_xor_sync(kFullMask, value, 1);
      break;
    default:
      break;
  }
  const unsigned odd = __ballot_sync(kFullMask, value & 1);
  const int any_negative = __any_sync(kFullMask, value < 0);
  const int all_positive = __all_sync(kFullMask, value > 0);
  int sum = value;  // in two halves of the warp, then over both
  for (int distance = 8; distance > 0; distance >>= 1) {
    sum += __shfl_down_sync(kFullMask, sum, distance, 16);
  }
  sum = __shfl_sync(kFullMask, sum, 0) + __shfl_sync(kFullMask, sum, 16);
  const int of_lane_5 = __shfl_sync(kFullMask, value, 5);
  if (lane == 0) {
    results[32] = static_cast<int>(odd);
    results[33] = any_negative;
    results[34] = all_positive;
    results[35] = sum;
    results[36] = of_lane_5;
  }
}

__global__ void __launch_bounds__(kThreads)
    atomic_statistics_kernel(const int* __restrict__ values, int count, int* __restrict__ results,
                             unsigned long long* __restrict__ sum, Fault fault) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  if (fault == Fault::blocks_write_same_word) {
    results[0] = values[i];
    return;
  }
  if (values[i] > 0) atomicAdd(&results[0], 1);
  atomicMax(&results[1], values[i]);
  atomicOr(&results[2], values[i]);
  atomicAdd(sum, static_cast<unsigned long long>(values[i]));
}

__global__ void __launch_bounds__(kThreads)
    copy_wide_kernel(const float* __restrict__ from, float* __restrict__ to, int count,
                     Fault fault) {
  const int i = 4 * (blockIdx.x * kThreads + threadIdx.x);
  if (i >= count) return;
  const int shift = fault == Fault::misaligned_load && i >= 4 ? 1 : 0;
  const float4 four = __ldg(reinterpret_cast<const float4*>(from + i - shift));
  *reinterpret_cast<float4*>(to + i) = four;
}

__global__ void read_unwritten_kernel(float* __restrict__ results) {
  MLLOSS_SHARED_ARRAY(float, tile, 32);
  results[blockIdx.x * 32 + threadIdx.x] = tile[threadIdx.x];
  tile[threadIdx.x] = 1.0f;
}

__global__ void __launch_bounds__(kThreads)
    rotate_in_clusters_kernel(const float* __restrict__ values, float* __restrict__ rotated,
                              Fault fault) {
  MLLOSS_SHARED_ARRAY(float, scale, 1);
  MLLOSS_DYNAMIC_SHARED_ARRAY(float, tile);
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const int blocks = cluster_blocks();
  const bool is_last = cluster_rank() == blocks - 1;
  tile[threadIdx.x] = values[i];
  if (threadIdx.x == 0) scale[0] = 1.0f;
  if (fault == Fault::unreachable_cluster_barrier && is_last && threadIdx.x == 7) __syncthreads();
  if (fault != Fault::missing_cluster_barrier) cluster_barrier();
  const int next = is_last && fault != Fault::read_beyond_cluster ? 0 : cluster_rank() + 1;
  const float* place = fault == Fault::read_unshared ? values + i : tile + threadIdx.x;
  rotated[i] = load_from_block(place, next) * load_from_block(scale, next);
  if (fault != Fault::missing_last_cluster_barrier) cluster_barrier();
}

__global__ void __launch_bounds__(kThreads)
    use_shared_memory_kernel(const int64_t dynamic_bytes, int* __restrict__ result) {
  MLLOSS_SHARED_ARRAY(float, fixed, kStaticBytes / sizeof(float));
  MLLOSS_DYNAMIC_SHARED_ARRAY(unsigned char, memory);
  if (dynamic_bytes == 0) return;
  fixed[threadIdx.x] = 1.0f;
  for (int64_t i = threadIdx.x; i < dynamic_bytes; i += kThreads) memory[i] = 1;
  __syncthreads();
  if (threadIdx.x == 0) *result = static_cast<int>(fixed[kThreads - 1]) + memory[dynamic_bytes - 1];
}

__global__ void record_order_kernel(int* __restrict__ order, int* __restrict__ next) {
  const int thread =
      threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * static_cast<int>(threadIdx.z));
  const int block =
      blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * static_cast<int>(blockIdx.z));
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  order[atomicAdd(next, 1)] = block * threads + thread;
}

int blocks_for(int count) { return (count + kThreads - 1) / kThreads; }

}  // namespace

template <typename T>
cudaError_t sum(const T* values, int64_t count, float* partials, unsigned* tickets, float* result,
                int blocks, Fault fault, cudaStream_t stream) {
  return MLLOSS_LAUNCH((sum_kernel<T>), blocks, kThreads, stream, values, partials, tickets, result,
                       count, fault);
}
template cudaError_t sum<float>(const float*, int64_t, float*, unsigned*, float*, int, Fault,
                                cudaStream_t);
template cudaError_t sum<__half>(const __half*, int64_t, float*, unsigned*, float*, int, Fault,
                                 cudaStream_t);
template cudaError_t sum<__nv_bfloat16>(const __nv_bfloat16*, int64_t, float*, unsigned*, float*,
                                        int, Fault, cudaStream_t);

cudaError_t count_distinct(const int* labels, int count, int* result, Fault fault,
                           cudaStream_t stream) {
  return MLLOSS_LAUNCH(count_distinct_kernel, 1, kThreads, stream, labels, count, result, fault);
}

cudaError_t reverse_in_blocks(const float* values, float* reversed, int count, Fault fault,
                              cudaStream_t stream) {
  return MLLOSS_LAUNCH(reverse_in_blocks_kernel, blocks_for(count), kThreads, stream, values,
                       reversed, count, fault);
}

cudaError_t reverse_in_warps(const float* values, float* reversed, int count, Fault fault,
                             cudaStream_t stream) {
  return MLLOSS_LAUNCH(reverse_in_warps_kernel, blocks_for(count), kThreads, stream, values,
                       reversed, count, fault);
}

cudaError_t warp_intrinsics(const int* values, int* results, Fault fault, cudaStream_t stream) {
  return MLLOSS_LAUNCH(warp_intrinsics_kernel, 1, 32, stream, values, results, fault);
}

cudaError_t atomic_statistics(const int* values, int count, int* results, unsigned long long* sum,
                              Fault fault, cudaStream_t stream) {
  return MLLOSS_LAUNCH(atomic_statistics_kernel, blocks_for(count), kThreads, stream, values, count,
                       results, sum, fault);
}

cudaError_t copy_wide(const float* from, float* to, int count, Fault fault, cudaStream_t stream) {
  return MLLOSS_LAUNCH(copy_wide_kernel, blocks_for(count / 4), kThreads, stream, from, to, count,
                       fault);
}

cudaError_t rotate_in_clusters(const float* values, float* rotated, int count, int cluster,
                               Fault fault, cudaStream_t stream) {
  return MLLOSS_LAUNCH_CLUSTERS(rotate_in_clusters_kernel, dim3(blocks_for(count)), dim3(kThreads),
                                cluster, kThreads * sizeof(float), stream, values, rotated, fault);
}

cudaError_t use_shared_memory(int64_t dynamic_bytes, int* result, cudaStream_t stream) {
  return MLLOSS_LAUNCH_CLUSTERS(use_shared_memory_kernel, dim3(1), dim3(kThreads), 1, dynamic_bytes,
                                stream, dynamic_bytes, result);
}

KernelLimits limits_of_use_shared_memory() {
  static KnownLimits limits;
  return limits.of(use_shared_memory_kernel, kThreads);
}

cudaError_t read_unwritten(float* results, cudaStream_t stream) {
  return MLLOSS_LAUNCH(read_unwritten_kernel, 2, 32, stream, results);
}

cudaError_t record_order(int* order, int* next, dim3 grid, dim3 block, cudaStream_t stream) {
  return MLLOSS_LAUNCH(record_order_kernel, grid, block, stream, order, next);
}

}  // namespace mlloss::selftest
