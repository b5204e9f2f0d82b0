// Small kernels that use everything the emulator offers, each with mistakes that can be switched
// on: the harness has to find them (tests/test_emulation.py).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/portability.cuh"

namespace mlloss::selftest {

enum class Fault {
  none,
  global_read_out_of_bounds,
  shared_write_out_of_bounds,
  shared_index_out_of_bounds,
  misaligned_load,
  missing_barrier,
  missing_warp_barrier,
  missing_fence,
  different_barriers,
  unreachable_barrier,
  different_intrinsics,
  different_masks,
  lane_outside_its_mask,
  read_from_outside_mask,
  read_from_returned_lane,
  blocks_write_same_word,
  missing_cluster_barrier,
  missing_last_cluster_barrier,
  unreachable_cluster_barrier,
  read_beyond_cluster,
  read_unshared,
};

inline constexpr int kThreads = 256;

// Sum of `count` values: per-block partial sums, added up in fixed order by the last block to
// finish. `tickets` is 0 at first.
template <typename T>
cudaError_t sum(const T* values, int64_t count, float* partials, unsigned* tickets, float* result,
                int blocks, Fault fault, cudaStream_t stream);

// Number of distinct labels, each in [0, 1024), by a bitmap in shared memory. One block.
cudaError_t count_distinct(const int* labels, int count, int* result, Fault fault,
                           cudaStream_t stream);

// Turns every block's share of the values round; threads beyond the end return at once.
cudaError_t reverse_in_blocks(const float* values, float* reversed, int count, Fault fault,
                              cudaStream_t stream);

// Turns every warp's share of the values round. `count` is a multiple of 32.
cudaError_t reverse_in_warps(const float* values, float* reversed, int count, Fault fault,
                             cudaStream_t stream);

// What one warp's intrinsics say about 32 integers: results[0..31] inclusive prefix sums, then
// ballot of the odd ones, any negative, all positive, sum, the value of lane 5.
inline constexpr int kWarpResults = 32 + 5;
cudaError_t warp_intrinsics(const int* values, int* results, Fault fault, cudaStream_t stream);

// Number of values that are positive, the largest value, all bits used, by integer atomics from
// many blocks. `results` is 0, INT_MIN, 0 at first.
cudaError_t atomic_statistics(const int* values, int count, int* results, unsigned long long* sum,
                              Fault fault, cudaStream_t stream);

// Copies by 16-byte loads and stores. `count` is a multiple of 4.
cudaError_t copy_wide(const float* from, float* to, int count, Fault fault, cudaStream_t stream);

// Every block's share of the values to the block before it in its cluster, the first one's to the
// last one. `count` is a multiple of cluster * kThreads.
cudaError_t rotate_in_clusters(const float* values, float* rotated, int count, int cluster,
                               Fault fault, cudaStream_t stream);

// Writes so much dynamic shared memory, beside kStaticBytes that are static.
inline constexpr int kStaticBytes = 1024;
cudaError_t use_shared_memory(int64_t dynamic_bytes, int* result, cudaStream_t stream);

// What the kernel of use_shared_memory may ask for.
KernelLimits limits_of_use_shared_memory();

// What a block finds in shared memory that it has not written, run after a block that has.
cudaError_t read_unwritten(float* results, cudaStream_t stream);

// (threadIdx, blockIdx) of every thread, in order of execution.
cudaError_t record_order(int* order, int* next, dim3 grid, dim3 block, cudaStream_t stream);

}  // namespace mlloss::selftest
