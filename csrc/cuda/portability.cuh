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
//   MLLOSS_DYNAMIC_SHARED_ARRAY(type, name), MLLOSS_LAUNCH_SHARED(kernel, grid, block, bytes, ...)
//       The same with an array of as many bytes as the launch says, up to what
//       dynamic_shared_memory(kernel) returns.
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

#define MLLOSS_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  ::mlloss::emulation::launch_shared(#kernel, kernel, grid, block, bytes, stream, __VA_ARGS__)

#define MLLOSS_DYNAMIC_SHARED_ARRAY(type, name) \
  type* const name = ::mlloss::emulation::dynamic_shared_array<type>()

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MLLOSS_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel<<<grid, block, 0, stream>>>(__VA_ARGS__), cudaGetLastError())

#define MLLOSS_SHARED_ARRAY(type, name, count) __shared__ type name[count]

#define MLLOSS_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...)               \
  ([&] {                                                                            \
    const cudaError_t error = ::mlloss::allow_dynamic_shared_memory(kernel, bytes); \
    if (error != cudaSuccess) return error;                                         \
    kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__);                            \
    return cudaGetLastError();                                                      \
  }())

#define MLLOSS_DYNAMIC_SHARED_ARRAY(type, name)           \
  extern __shared__ uint4 mlloss_dynamic_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(mlloss_dynamic_shared_memory)

#endif

namespace mlloss {

// The most dynamic shared memory that a block of this kernel may have on the current device.
template <class Kernel>
int64_t dynamic_shared_memory([[maybe_unused]] Kernel* kernel) {
  int device = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    return 0;
  }
#ifdef MLLOSS_EMULATED
  return most;
#else
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return 0;
  return most - static_cast<int64_t>(attributes.sharedSizeBytes);
#endif
}

#ifndef MLLOSS_EMULATED
// More than 48 KB have to be asked for.
template <class Kernel>
cudaError_t allow_dynamic_shared_memory(Kernel* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
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

}  // namespace mlloss
