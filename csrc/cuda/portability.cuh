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
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef MLLOSS_EMULATED

#include "emulator.h"

#define MLLOSS_LAUNCH(kernel, grid, block, stream, ...) \
  ::mlloss::emulation::launch(#kernel, kernel, grid, block, stream, __VA_ARGS__)

#define MLLOSS_SHARED_ARRAY(type, name, count)                       \
  static constinit ::mlloss::emulation::SharedArrayTag name##_tag{}; \
  auto& name = ::mlloss::emulation::shared_array<type, (count)>(name##_tag)

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MLLOSS_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel<<<grid, block, 0, stream>>>(__VA_ARGS__), cudaGetLastError())

#define MLLOSS_SHARED_ARRAY(type, name, count) __shared__ type name[count]

#endif

namespace mlloss {

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
