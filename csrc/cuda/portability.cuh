// The only place that knows which compiler reads the kernels.
//
// Two compilers do: nvcc, for the GPU, and, with MLLOSS_EMULATED defined, a plain C++ compiler, for
// the tests that run every CUDA thread as a fiber on the CPU (tests/emulation). Both see the same
// kernel source, which is ordinary CUDA but for two constructs that C++ has no syntax for:
//
//   MLLOSS_LAUNCH(kernel, grid, block, stream, arguments...) -> cudaError_t
//       kernel<<<grid, block, 0, stream>>>(arguments...). A kernel that is a template-id goes in
//       parentheses: MLLOSS_LAUNCH((sum<float, 256>), grid, 256, stream, values, result).
//   MLLOSS_SHARED_ARRAY(type, name, count)
//       __shared__ type name[count]. It is aligned for `type` and no further: write the type that
//       the widest access needs.
//   MLLOSS_DYNAMIC_SHARED_ARRAY(type, name), MLLOSS_LAUNCH_CLUSTERS(kernel, grid, block, cluster,
//   bytes, stream, arguments...)
//       The same with an array of as many bytes as the launch says, and with clusters of `cluster`
//       blocks, a divisor of the grid's blocks. KnownLimits tells what a kernel may ask for.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <type_traits>

#ifdef MLLOSS_EMULATED

#include "emulator.h"

#define MLLOSS_LAUNCH(kernel, grid, block, stream, ...) \
  ::mlloss::emulation::launch(#kernel, kernel, grid, block, stream, __VA_ARGS__)

#define MLLOSS_SHARED_ARRAY(type, name, count)                       \
  static constinit ::mlloss::emulation::SharedArrayTag name##_tag{}; \
  auto& name = ::mlloss::emulation::shared_array<type, (count)>(name##_tag)

#define MLLOSS_LAUNCH_CLUSTERS(kernel, grid, block, cluster, bytes, stream, ...)            \
  ::mlloss::emulation::launch_cluster(#kernel, kernel, grid, block, cluster, bytes, stream, \
                                      __VA_ARGS__)

#define MLLOSS_DYNAMIC_SHARED_ARRAY(type, name) \
  type* const name = ::mlloss::emulation::dynamic_shared_array<type>()

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MLLOSS_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel<<<grid, block, 0, stream>>>(__VA_ARGS__), cudaGetLastError())

#define MLLOSS_SHARED_ARRAY(type, name, count) __shared__ type name[count]

#define MLLOSS_LAUNCH_CLUSTERS(kernel, grid, block, cluster, bytes, stream, ...) \
  ::mlloss::launch_clusters(kernel, grid, block, cluster, bytes, stream, __VA_ARGS__)

#define MLLOSS_DYNAMIC_SHARED_ARRAY(type, name)           \
  extern __shared__ uint4 mlloss_dynamic_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(mlloss_dynamic_shared_memory)

#endif

namespace mlloss {

// ---- Limits of a kernel ----

struct KernelLimits {
  int64_t shared_bytes = 0;  // dynamic, of a block
  int cluster_blocks = 1;  // of the largest cluster whose blocks each have so many; 1: no clusters
  int multiprocessors = 1;
};

constexpr int kMostClusterBlocks = 16;  // more than 8 exist on some GPUs only, and are asked for

template <class Kernel>
cudaError_t attributes_of(Kernel* kernel, cudaFuncAttributes* attributes) {
#ifdef MLLOSS_EMULATED
  *attributes = {};
  attributes->sharedSizeBytes = emulation::static_shared_bytes(kernel);
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
#else
  return cudaFuncGetAttributes(attributes, kernel);
#endif
}

// Finds the limits of a kernel in blocks of `threads` threads on the current device, and lets it
// reach them.
template <class Kernel>
cudaError_t find_limits(Kernel* kernel, int device, int threads, KernelLimits* limits) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  int most = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  error = attributes_of(kernel, &attributes);
  if (error != cudaSuccess) return error;
  const int64_t bytes = most - static_cast<int64_t>(attributes.sharedSizeBytes);
  if (bytes <= 0) return cudaSuccess;
  // More than 48 KB have to be asked for.
  error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  limits->shared_bytes = bytes;
  // Code for an older GPU knows no clusters, be it translated for this one.
  if (attributes.binaryVersion < 90 || attributes.ptxVersion < 90) return cudaSuccess;
  cudaLaunchAttribute shape = {};
  shape.id = cudaLaunchAttributeClusterDimension;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.attrs = &shape;
  config.numAttrs = 1;
  error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (int blocks = kMostClusterBlocks; blocks > 1; blocks /= 2) {
    config.gridDim = dim3(blocks);
    shape.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, function, &config);
    if (error == cudaSuccess && clusters > 0) {
      limits->cluster_blocks = blocks;
      break;
    }
  }
  return cudaSuccess;
}

// The limits of one kernel, found once for each device: asking takes longer than a launch. Threads
// may share an object.
class KnownLimits {
 public:
  template <class Kernel>
  KernelLimits of(Kernel* kernel, int threads) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return {};
    const std::lock_guard lock(mutex_);
    const auto known = by_device_.find(device);
    if (known != by_device_.end()) return known->second;
    KernelLimits limits;
    const cudaError_t error = find_limits(kernel, device, threads, &limits);
    cudaGetLastError();  // what is refused here is no error of the next launch
    if (error != cudaSuccess) return {};
    by_device_[device] = limits;
    return limits;
  }

 private:
  std::mutex mutex_;
  std::map<int, KernelLimits> by_device_;
};

#ifndef MLLOSS_EMULATED
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, int cluster,
                            int64_t bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute shape = {};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &shape;
  config.numAttrs = cluster > 1 ? 1 : 0;  // older GPUs know no such attribute
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// ---- Clusters ----
// Blocks that run at the same time and read each other's shared memory, from compute capability 9.0
// on. Code for less, and a launch without clusters, sees clusters of one block. emulator.h has the
// same functions.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MLLOSS_HAS_CLUSTERS 1
#else
#define MLLOSS_HAS_CLUSTERS 0
#endif

__device__ __forceinline__ int cluster_blocks() {
#if MLLOSS_HAS_CLUSTERS
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  return static_cast<int>(blocks);
#else
  return 1;
#endif
}

// Of this block in its cluster: neighbours along x have consecutive ranks.
__device__ __forceinline__ int cluster_rank() {
#if MLLOSS_HAS_CLUSTERS
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

// All threads of the cluster wait for each other here, and see what the others wrote before.
__device__ __forceinline__ void cluster_barrier() {
#if MLLOSS_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// What lies at an address of this block's shared memory, in the block `rank` of the cluster. That
// block has to stay until it has been read.
template <class T>
__device__ __forceinline__ T load_from_block(const T* address, [[maybe_unused]] int rank) {
#if MLLOSS_HAS_CLUSTERS
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0 && alignof(T) % 4 == 0);
  const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(address));
  uint32_t place;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(own), "r"(rank));
  uint32_t words[sizeof(T) / 4];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(words[i])
                 : "r"(place + 4 * i)
                 : "memory");
  }
  T value;
  memcpy(&value, words, sizeof(T));
  return value;
#else
  return *address;
#endif
}
#endif

// Writes zeros, in the order of the stream.
inline cudaError_t fill_with_zeros(void* data, int64_t bytes,
                                   [[maybe_unused]] cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;  // `data` may be nullptr
#ifdef MLLOSS_EMULATED
  std::memset(data, 0, static_cast<size_t>(bytes));
  return cudaSuccess;
#else
  return cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream);
#endif
}

// Writes to global memory. Of 16 bytes that have been put together in registers, nvcc often makes
// four stores, which take four times as long.
template <class T>
__device__ __forceinline__ void store_global(T* address, T value) {
  *address = value;
}
#ifdef __CUDA_ARCH__
__device__ __forceinline__ void store_global(uint4* address, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(address)), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
               : "memory");
}
#endif

// What `.ftz` does to operands and results of the approximate instructions below. Off the GPU it is
// imitated, so that tests see the same cut-offs far out: exp2_approx(-127) is 0, not 2^-127.
__host__ __device__ __forceinline__ float flush_subnormal(float value) {
  return fabsf(value) < FLT_MIN ? copysignf(0.0f, value) : value;
}

// 2^exponent; relative error 2^-22.
__host__ __device__ __forceinline__ float exp2_approx(float exponent) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
#else
  return flush_subnormal(exp2f(flush_subnormal(exponent)));
#endif
}

// 1 / value; relative error 2^-23, and 0 for |value| > 2^126.
__host__ __device__ __forceinline__ float rcp_approx(float value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  return flush_subnormal(1.0f / flush_subnormal(value));
#endif
}

// The larger of two numbers; NaN if one of them is.
__host__ __device__ __forceinline__ float larger_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

// Bits [shift, shift + 32) of high:low, 0 <= shift < 32.
__host__ __device__ __forceinline__ uint32_t funnel_shift_right(uint32_t low, uint32_t high,
                                                                int shift) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(low, high, shift);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
#endif
}

// All bits of each half of `value` as its highest bit.
__host__ __device__ __forceinline__ uint32_t spread_signs_of_halves(uint32_t value) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(result) : "r"(value));
  return result;
#else
  return (value & 0x8000u ? 0xffffu : 0u) | (value & 0x80000000u ? 0xffff0000u : 0u);
#endif
}

}  // namespace mlloss
