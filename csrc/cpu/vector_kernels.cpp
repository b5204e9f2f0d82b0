#include "cpu/vector_kernels.h"

#include <cstdlib>
#include <cstring>
#include <string_view>

#include "cpu/isa.h"
#include "cpu/short_row_kernels.h"
#include "math/scalar.h"

#if defined(__x86_64__) && defined(__GNUC__)
#ifndef __clang__  // GCC 12 warns of variables of its own header
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#ifndef __clang__
#pragma GCC diagnostic pop
#endif
#define MLLOSS_VECTORS 1
#else
#define MLLOSS_VECTORS 0
#endif

#if MLLOSS_VECTORS

// Unrolled so early that the compiler keeps arrays of vectors in registers.
#define MLLOSS_FOR_VECTORS(j) _Pragma("GCC unroll 8") for (int j = 0; j < kVectors; ++j)

namespace mlloss::cpu {
namespace {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147182f;  // off by 1.9e-9: at most 2.4e-7 of e^x for x >= -87
// e^r for |r| <= ln(2) / 2: minimax polynomial, relative error 7.5e-8. From the highest power on.
constexpr float kExponential[] = {8.297646e-3f,  4.191543e-2f, 1.6667575e-1f,
                                  4.9998894e-1f, 9.999997e-1f, 1.0f};

// (log(1 + f) - f + f^2 / 2) / f^3 for f in [sqrt(1/2) - 1, sqrt(2) - 1]: minimax polynomial,
// relative error of the logarithm 8e-10.
constexpr float kLogarithm[] = {6.74663395e-2f,  -1.16756455e-1f, 1.18881617e-1f,
                                -1.24055899e-1f, 1.42195526e-1f,  -1.66679958e-1f,
                                2.00021186e-1f,  -2.50000096e-1f, 3.33333126e-1f};
// log(1 + e) / e for e in [0, 1]: minimax polynomial, relative error 3.3e-8.
constexpr float kLog1p[] = {5.36542246e-3f,  -3.00683007e-2f, 7.92088285e-2f,
                            -1.37541875e-1f, 1.91538483e-1f,  -2.48572171e-1f,
                            3.33213300e-1f,  -4.99996483e-1f, 1.0f};

constexpr int kUpperHalf = static_cast<int>(0xffff0000u);  // of 32 bits: a bf16 number

// Vectors are taken so many at a time, as a group: independent chains of additions hide their
// latency.
constexpr int kVectors = 4;

// Bytes from what is read to what is fetched: about as long as memory takes to answer.
constexpr int kPrefetch = 16384;

}  // namespace
}  // namespace mlloss::cpu

#define MLLOSS_TARGET target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2,popcnt")
#define MLLOSS_VECTOR inline __attribute__((always_inline, MLLOSS_TARGET))
#define MLLOSS_VECTOR_LAMBDA __attribute__((always_inline, MLLOSS_TARGET))
namespace mlloss::cpu::avx512 {
namespace {
#include "cpu/vector_avx512.h"
#include "cpu/vector_loops.h"
#include "cpu/vector_short_rows.h"
}  // namespace
}  // namespace mlloss::cpu::avx512
#undef MLLOSS_TARGET

#define MLLOSS_TARGET target("avx2,fma,f16c,popcnt")
namespace mlloss::cpu::avx2 {
namespace {
#include "cpu/vector_avx2.h"
#include "cpu/vector_loops.h"
#include "cpu/vector_short_rows.h"
}  // namespace
}  // namespace mlloss::cpu::avx2

namespace mlloss::cpu {
namespace {

const VectorKernels* choose() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = variable == nullptr ? "avx512" : variable;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
  if (!has_avx2 || limit == "default") return nullptr;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
  return has_avx512 && limit != "avx2" ? &avx512::kKernels : &avx2::kKernels;
}

}  // namespace

const VectorKernels* vector_kernels() {
  static const VectorKernels* const kernels = choose();
  return kernels;
}

const ShortRowKernels* short_row_kernels() {
  const VectorKernels* kernels = vector_kernels();
  return kernels == &avx512::kKernels ? &avx512::kShortRowKernels
         : kernels == &avx2::kKernels ? &avx2::kShortRowKernels
                                      : nullptr;
}

}  // namespace mlloss::cpu

#else

namespace mlloss::cpu {

const VectorKernels* vector_kernels() { return nullptr; }
const ShortRowKernels* short_row_kernels() { return nullptr; }

}  // namespace mlloss::cpu

#endif
