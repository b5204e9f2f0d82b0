// Exponentials and logarithms for the losses, for one element, on host and device.
//
// On the CPU these are polynomials that compilers vectorise; on the GPU, the special-function unit.
// Both keep their *relative* precision where results are tiny: that is where confident negatives
// live, and what a sum over a million labels consists of. The fp64 versions call the C library.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__) || defined(MLLOSS_EMULATED)
#include "cuda/portability.cuh"
#define MLLOSS_DEVICE_MATH 1
#define MLLOSS_MATH __host__ __device__ __forceinline__
#else
#define MLLOSS_DEVICE_MATH 0
// Inlined into every clone of a loop that is compiled for several instruction sets.
#define MLLOSS_MATH inline __attribute__((always_inline))
#endif

namespace mlloss {

template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
template <class Real>
constexpr Real kNaN = std::numeric_limits<Real>::quiet_NaN();

template <class Real>
MLLOSS_MATH Real absolute(Real x) {
  return std::fabs(x);
}

MLLOSS_MATH float float_from_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MLLOSS_MATH int32_t bits_from_float(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

#if !MLLOSS_DEVICE_MATH
// e^x = 2^k (1 + rest) for -87 < x <= 0.
struct ExponentialParts {
  float power;  // 2^k
  float rest;
};

MLLOSS_MATH ExponentialParts exponential_parts(float x) {
  // x = k ln 2 + r with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer, and leaves that
  // integer in the low bits.
  const float kRound = 12582912.0f;
  const float shifted = x * 1.44269504f + kRound;
  const float k = shifted - kRound;
  float r = x - k * 0.693145752f;  // ln 2, its leading 16 bits: exact product
  r = r - k * 1.42860682e-6f;      // ln 2, the rest
  // (e^r - 1 - r) / r^2: minimax polynomial, relative error of e^r 3e-9.
  float p = 1.38145986e-3f;
  p = p * r + 8.36871688e-3f;
  p = p * r + 4.16683880e-2f;
  p = p * r + 1.66665206e-1f;
  p = p * r + 4.99999934e-1f;
  // A multiplication with the power rather than an addition to the exponent: NaN stays NaN whatever
  // its payload.
  return {float_from_bits((bits_from_float(shifted) << 23) + 0x3f800000), p * (r * r) + r};
}

// log of 2^exponent (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1].
MLLOSS_MATH float log_of_parts(float exponent, float f) {
  // (log(1 + f) - f + f^2 / 2) / f^3: minimax polynomial, relative error of the logarithm 8e-10.
  float p = 6.74663395e-2f;
  p = p * f - 1.16756455e-1f;
  p = p * f + 1.18881617e-1f;
  p = p * f - 1.24055899e-1f;
  p = p * f + 1.42195526e-1f;
  p = p * f - 1.66679958e-1f;
  p = p * f + 2.00021186e-1f;
  p = p * f - 2.50000096e-1f;
  p = p * f + 3.33333126e-1f;
  float y = p * f * (f * f);
  y = y + exponent * -2.12194440e-4f;  // ln 2 = 0.693359375 - 2.1219444e-4
  y = y - 0.5f * (f * f);
  return f + y + exponent * 0.693359375f;
}

// log(u + lost), u > 0 normal, |lost| at most a rounding error of u.
MLLOSS_MATH float log_of_sum(float u, float lost) {
  // u = 2^k m with m in [sqrt(1/2), sqrt(2)).
  const int32_t bits = bits_from_float(u);
  const int32_t k = (bits - 0x3f3504f3) >> 23;
  const float m = float_from_bits(bits - (k << 23));
  const float f = (m - 1.0f) + lost * float_from_bits(0x3f800000 - (k << 23));
  return log_of_parts(static_cast<float>(k), f);
}
#endif

// e^x for x <= 0 (or NaN). Results below 1.2e-38, which are subnormal, are 0.
MLLOSS_MATH float exp_nonpositive(float x) {
#if MLLOSS_DEVICE_MATH
  // 2^t, t = x log2(e) rounded: what rounding has changed, up to 2^-24 |t|, is a relative error
  // that sums of confident negatives would keep, and is mended. The bound keeps infinity out of
  // that.
  const float bounded = larger_or_nan(x, -126.0f);
  const float t = bounded * 1.44269504f;
  const float power = exp2_approx(t);
  return fmaf(power, fmaf(t, -0.693147182f, bounded), power);
#else
  const ExponentialParts parts = exponential_parts(x);
  return x < -87.3365448f ? 0.0f : (parts.rest + 1.0f) * parts.power;
#endif
}

MLLOSS_MATH double exp_nonpositive(double x) { return std::exp(x); }

// e^x - 1 for x <= 0 (or NaN), to full relative precision.
MLLOSS_MATH float expm1_nonpositive(float x) {
#if MLLOSS_DEVICE_MATH
  return expm1f(x);
#else
  const ExponentialParts parts = exponential_parts(x);
  return x < -87.0f ? -1.0f : parts.rest * parts.power + (parts.power - 1.0f);
#endif
}

MLLOSS_MATH double expm1_nonpositive(double x) { return std::expm1(x); }

// log(1 + q) for q >= 0.
MLLOSS_MATH float log1p_nonnegative(float q) {
#if MLLOSS_DEVICE_MATH
  return log1pf(q);
#else
  const float u = 1.0f + q;
  // What rounding dropped. NaN goes its way through here.
  const float lost = q < 1.0f ? q - (u - 1.0f) : 1.0f - (u - q);
  return log_of_sum(u, lost);
#endif
}

MLLOSS_MATH double log1p_nonnegative(double q) { return std::log1p(q); }

// log(x), or log(1 - x) for the `complement`, for 0 <= x <= 1 (or NaN).
MLLOSS_MATH float log_of_side(float x, bool complement) {
#if MLLOSS_DEVICE_MATH
  return complement ? log1pf(-x) : logf(x);
#else
  // One logarithm for both: that of u plus what rounding u has lost. x * 0 keeps NaN.
  const float rest = 1.0f - x;
  const float lost = complement ? (1.0f - rest) - x : x * 0;
  const float u = complement ? rest : x;
  const bool subnormal = u < 1.17549435e-38f;
  const float logarithm = log_of_sum(subnormal ? u * 16777216.0f : u, lost);  // 2^24
  const float value = subnormal ? logarithm - 16.6355323f : logarithm;        // 24 ln 2
  return u == 0 ? -kInfinity<float> : value;
#endif
}

MLLOSS_MATH double log_of_side(double x, bool complement) {
  return complement ? std::log1p(-x) : std::log(x);
}

// log(x) for 0 <= x <= 1 (or NaN).
template <class Real>
MLLOSS_MATH Real log_unit(Real x) {
  return log_of_side(x, false);
}

// 1 / x for 1 <= x <= 2.
MLLOSS_MATH float reciprocal(float x) {
#if MLLOSS_DEVICE_MATH
  return rcp_approx(x);
#else
  return 1.0f / x;
#endif
}

MLLOSS_MATH double reciprocal(double x) { return 1.0 / x; }

// max(x, 0); NaN stays NaN, so that a loss with a NaN logit is NaN.
template <class Real>
MLLOSS_MATH Real positive_part(Real x) {
  return x < 0 ? Real(0) : x;
}

// What a pointwise loss is given per element besides logit and target; 1 where nothing is given.
template <class Real, int kCount_>
struct ElementParameters {
  static constexpr int kCount = kCount_;
  Real value[kCount > 0 ? kCount : 1];

  MLLOSS_MATH static ElementParameters ones() {
    ElementParameters parameters;
    for (Real& value : parameters.value) value = 1;
    return parameters;
  }
};

// sigmoid(x) and sigmoid(-x), both to full relative precision: neither is one minus the other.
template <class Real>
struct SigmoidPair {
  Real p, q;
};

// `e` is exp(-|x|).
template <class Real>
MLLOSS_MATH SigmoidPair<Real> sigmoid_pair(Real x, Real e) {
  const Real large = reciprocal(Real(1) + e);
  const Real small = e * large;
  return x < 0 ? SigmoidPair<Real>{small, large} : SigmoidPair<Real>{large, small};
}

}  // namespace mlloss
