// CUDA on the CPU, for tests: kernel source compiled by a C++ compiler, one fiber per CUDA thread.
//
// csrc/cuda/portability.cuh includes this header when MLLOSS_EMULATED is defined. It gives kernels
// the CUDA built-ins they use; types and conversions (__half, __nv_bfloat16, float4, dim3, ...)
// come from the real CUDA headers. emulator.cpp is the scheduler. What it checks:
//
// - __syncthreads: threads of a block that meet at different barriers, a barrier that some threads
//   can never reach. Threads that have returned do not count, as on the GPU.
// - Warp intrinsics: a caller outside its own mask, masks or intrinsics that disagree, a shuffle
//   that reads a lane which is outside the mask or has returned.
// - Shared memory: every block starts with all bits set (NaN, -1), between red zones. Static and
//   dynamic memory together are within the limits of a GPU.
// - Clusters: a barrier that some threads can never reach, reading a block that has returned or
//   something that is not in shared memory.
// - Missing barriers: clusters, and threads between two barriers, run one after the other in an
//   order that set_thread_order chooses, so that a kernel which relies on luck gives a wrong result
//   in one of the orders. ThreadSanitizer finds the same by looking at the accesses: __syncthreads,
//   __syncwarp, barriers of clusters, and atomics after a __threadfence order memory, shuffles and
//   votes do not.
// - AddressSanitizer and UndefinedBehaviorSanitizer see plain C++ and check all of it: addresses,
//   alignment of wide loads, indices of shared arrays, shifts, signed overflow.
//
// A violation throws mlloss::emulation::Error out of MLLOSS_LAUNCH. Left out: grid-wide barriers,
// streams that overlap, warp lockstep, anything about speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

// nvcc alone defines the first. The second would silently mean "one per thread" here, so that its
// use must not compile: MLLOSS_SHARED_ARRAY takes its place.
#define __launch_bounds__(...)
#undef __shared__

// Set by the scheduler whenever it switches to a thread.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

namespace mlloss::emulation {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// In which order clusters, and threads that could run at the same time, do run. In the first two
// orders a warp runs until all its lanes wait for other warps; `shuffled` picks any thread that can
// run.
enum class ThreadOrder { ascending, descending, shuffled };
void set_thread_order(ThreadOrder order, std::uint64_t seed);

// Number of kernels that have run to their end in this process.
std::uint64_t launch_count();

// The kernels that have run since this was last asked, up to some number.
struct LaunchRecord {
  std::string kernel_name;
  dim3 grid, block;
  unsigned cluster;
  std::size_t static_bytes, dynamic_bytes;  // of shared memory
};
std::vector<LaunchRecord> take_launches();

// What launchers may ask about the GPU. As on an H100 at first, but for the number of
// multiprocessors, which is small enough for small inputs to fill them. Less memory lets small
// inputs take the ways of large ones.
inline constexpr std::size_t kMaxDeviceSharedBytes = 227 << 10;
struct Device {
  int number = 0;                                    // set_device chooses it: each has another one
  std::size_t shared_bytes = kMaxDeviceSharedBytes;  // of a block, static and dynamic
  unsigned cluster_blocks = 16;                      // 1: no clusters
  int multiprocessors = 2;
};
void set_device(Device device);
Device device();

// ---- Launch -------------------------------------------------------------------------------------

struct KernelBody {
  void (*call)(const void* closure);
  const void* closure;
};

struct Launch {
  const char* kernel_name;
  dim3 grid, block;
  unsigned cluster;  // blocks, a divisor of grid.x
  std::size_t dynamic_bytes;
};

cudaError_t run_grid(const Launch& launch, KernelBody body);

template <typename Closure>
KernelBody body_of(const Closure& closure) {
  return {[](const void* pointer) { (*static_cast<const Closure*>(pointer))(); }, &closure};
}

// The stream is not needed: every launch runs to its end at once.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_cluster(const char* kernel_name, void (*kernel)(Parameters...), dim3 grid,
                           dim3 block, int cluster, std::size_t dynamic_bytes,
                           cudaStream_t /*stream*/, const Arguments&... arguments) {
  const auto closure = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return run_grid({kernel_name, grid, block, static_cast<unsigned>(cluster), dynamic_bytes},
                  body_of(closure));
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const char* kernel_name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   cudaStream_t stream, const Arguments&... arguments) {
  return launch_cluster(kernel_name, kernel, grid, block, 1, 0, stream, arguments...);
}

// Bytes of a kernel's shared arrays. To learn of them, the emulator runs one thread of it with
// default parameters, for which it has to find nothing to do.
std::size_t static_shared_bytes(const void* kernel, KernelBody body);

template <typename... Parameters>
std::size_t static_shared_bytes(void (*kernel)(Parameters...)) {
  const auto closure = [&] { kernel(std::remove_const_t<Parameters>{}...); };
  return static_shared_bytes(reinterpret_cast<const void*>(kernel), body_of(closure));
}

// ---- Shared memory ------------------------------------------------------------------------------

using Location = std::source_location;

// One per MLLOSS_SHARED_ARRAY in the source; remembers where the current block keeps that array.
struct SharedArrayTag {
  std::uint64_t block_serial = 0;
  void* memory = nullptr;
};

inline constexpr std::size_t kMaxSharedAlignment = 16;
void* shared_memory(SharedArrayTag& tag, std::size_t bytes, std::size_t alignment);

// An array, not a pointer: UndefinedBehaviorSanitizer then checks every index.
template <typename T, std::size_t count>
auto shared_array(SharedArrayTag& tag) -> T (&)[count] {
  static_assert(std::is_trivially_destructible_v<T> && alignof(T) <= kMaxSharedAlignment);
  return *static_cast<T(*)[count]>(shared_memory(tag, sizeof(T[count]), alignof(T)));
}

// The memory that the launch has asked for.
void* dynamic_shared_memory();

template <typename T>
T* dynamic_shared_array() {
  static_assert(std::is_trivially_destructible_v<T> && alignof(T) <= kMaxSharedAlignment);
  return static_cast<T*>(dynamic_shared_memory());
}

// ---- Clusters -----------------------------------------------------------------------------------

int blocks_of_cluster();
int rank_in_cluster();

// Waits for every live thread of the cluster.
void wait_for_cluster(const Location& where);

// Where another block of the cluster keeps what lies at an address in this block's shared memory.
const void* shared_of_block(const void* address, std::size_t bytes, int rank,
                            const Location& where);

// ---- Barriers and warp intrinsics ---------------------------------------------------------------

enum class WarpOperation : std::uint8_t { sync, shuffle, ballot, add };

// Waits for every live lane in `mask`, then gives this lane its result: the value of `source_lane`,
// the ballot over `value`, or the sum of `value`.
std::uint64_t warp_collective(WarpOperation operation, const char* intrinsic, unsigned mask,
                              std::uint64_t value, int source_lane, const Location& where);

// Waits for every live thread of the block and returns whether `predicate` held in any of them.
bool block_barrier(const char* intrinsic, bool predicate, const Location& where);

int lane_index();
void fence_memory();
bool has_fenced_memory();
[[noreturn]] void trap(const Location& where);

template <typename T>
__forceinline__ T shuffle(const char* intrinsic, unsigned mask, T value, int source_lane,
                          const Location& where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(WarpOperation::shuffle, intrinsic, mask, bits, source_lane, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The lane that lies at `offset` in this lane's segment of `width` lanes, or this lane where that
// would leave the segment.
inline int lane_in_segment(int offset, int width) {
  const int lane = lane_index();
  return offset < 0 || offset >= width ? lane : lane / width * width + offset;
}

// Atomics order memory only in threads that have called __threadfence, as in the pattern "write,
// fence, count up". A relaxed atomic everywhere else lets ThreadSanitizer see what the atomic does
// not protect.
template <typename Operation>
auto with_memory_order(Operation operation) {
  return has_fenced_memory() ? operation(std::integral_constant<int, __ATOMIC_ACQ_REL>{})
                             : operation(std::integral_constant<int, __ATOMIC_RELAXED>{});
}

template <typename T, typename Combine>
T atomic_update(T* address, Combine combine) {
  // No floating-point atomics: their sum depends on the order of the threads.
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  return with_memory_order([&](auto order) {
    T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(address, &seen, combine(seen), false, order.value,
                                        __ATOMIC_RELAXED)) {
    }
    return seen;
  });
}

// ---- CUDA built-ins -----------------------------------------------------------------------------

// Last parameter of all that may fail: the line of the kernel that makes the call.
#define MLLOSS_CALLED_FROM const Location& where = Location::current()

namespace builtins {

inline void __syncthreads(MLLOSS_CALLED_FROM) { block_barrier("__syncthreads", false, where); }

inline int __syncthreads_or(int predicate, MLLOSS_CALLED_FROM) {
  return block_barrier("__syncthreads_or", predicate != 0, where);
}

inline int __syncthreads_and(int predicate, MLLOSS_CALLED_FROM) {
  return !block_barrier("__syncthreads_and", predicate == 0, where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, MLLOSS_CALLED_FROM) {
  warp_collective(WarpOperation::sync, "__syncwarp", mask, 0, 0, where);
}

template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
                              MLLOSS_CALLED_FROM) {
  const int lane = lane_in_segment(source & (width - 1), width);
  return shuffle("__shfl_sync", mask, value, lane, where);
}

template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                                  MLLOSS_CALLED_FROM) {
  // Earlier segments can be read, later ones cannot.
  const int other = lane_index() ^ lane_mask;
  const int lane = other <= (lane_index() | (width - 1)) ? other : lane_index();
  return shuffle("__shfl_xor_sync", mask, value, lane, where);
}

template <typename T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                                   MLLOSS_CALLED_FROM) {
  const int offset = (lane_index() & (width - 1)) + static_cast<int>(delta);
  const int lane = lane_in_segment(offset, width);
  return shuffle("__shfl_down_sync", mask, value, lane, where);
}

template <typename T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                                 MLLOSS_CALLED_FROM) {
  const int offset = (lane_index() & (width - 1)) - static_cast<int>(delta);
  const int lane = lane_in_segment(offset, width);
  return shuffle("__shfl_up_sync", mask, value, lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MLLOSS_CALLED_FROM) {
  return static_cast<unsigned>(
      warp_collective(WarpOperation::ballot, "__ballot_sync", mask, predicate != 0, 0, where));
}

inline int __any_sync(unsigned mask, int predicate, MLLOSS_CALLED_FROM) {
  return warp_collective(WarpOperation::ballot, "__any_sync", mask, predicate != 0, 0, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, MLLOSS_CALLED_FROM) {
  return warp_collective(WarpOperation::ballot, "__all_sync", mask, predicate == 0, 0, where) == 0;
}

template <typename T>
T __reduce_add_sync(unsigned mask, T value, MLLOSS_CALLED_FROM) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return static_cast<T>(warp_collective(WarpOperation::add, "__reduce_add_sync", mask,
                                        static_cast<unsigned>(value), 0, where));
}

// What portability.cuh calls thread-block clusters by.
inline int cluster_blocks() { return blocks_of_cluster(); }
inline int cluster_rank() { return rank_in_cluster(); }
inline void cluster_barrier(MLLOSS_CALLED_FROM) { wait_for_cluster(where); }

template <typename T>
T load_from_block(const T* address, int rank, MLLOSS_CALLED_FROM) {
  return *static_cast<const T*>(shared_of_block(address, sizeof(T), rank, where));
}

inline void __threadfence() { fence_memory(); }
inline void __threadfence_block() { fence_memory(); }

[[noreturn]] inline void __trap(MLLOSS_CALLED_FROM) { trap(where); }

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  return with_memory_order(
      [&](auto order) { return __atomic_fetch_add(address, value, order.value); });
}

template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return with_memory_order(
      [&](auto order) { return __atomic_fetch_or(address, value, order.value); });
}

template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return with_memory_order(
      [&](auto order) { return __atomic_fetch_and(address, value, order.value); });
}

template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return atomic_update(address, [&](T) { return value; });
}

template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return atomic_update(address, [&](T seen) { return std::max(seen, value); });
}

template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return atomic_update(address, [&](T seen) { return std::min(seen, value); });
}

template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return atomic_update(address, [&](T seen) { return seen == expected ? desired : seen; });
}

// Cache hints.
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) {
  return std::countl_zero(static_cast<unsigned long long>(bits));
}
inline int __ffs(int bits) {
  return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1;
}
inline int __ffsll(long long bits) {
  return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(bits)) + 1;
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

inline float __expf(float value) { return expf(value); }
inline float __logf(float value) { return logf(value); }
inline float __fdividef(float numerator, float denominator) { return numerator / denominator; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

// CUDA has these for mixed arithmetic types, in the global namespace.
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

}  // namespace builtins
}  // namespace mlloss::emulation

#undef MLLOSS_CALLED_FROM

using namespace mlloss::emulation::builtins;
