// Multi-label categorical cross-entropy (ZLPR) of one row of logits x with targets y in [0, 1]:
//
//   L = log(e^-s0 + sum_i y_i e^-x_i) + log(e^s0 + sum_i (1 - y_i) e^x_i)
//     = softplus(A + s0) + softplus(B - s0),
//   A = log sum_i y_i e^-x_i,  B = log sum_i (1 - y_i) e^x_i  (-inf for an empty sum)
//
// Su et al., "ZLPR: A Novel Loss for Multi-label Classification", arXiv:2208.02955; for y in {0, 1}
// the first sum is over the positives and the second over the negatives.
//
// Gradients, with the softmax denominators e^-s0 + e^A and e^s0 + e^B:
//   dL/dx_i = -y_i e^-x_i / (e^-s0 + e^A) + (1 - y_i) e^x_i / (e^s0 + e^B)
//   dL/ds0  = -e^-s0 / (e^-s0 + e^A) + e^s0 / (e^s0 + e^B)
#pragma once
#include <limits>

#include "math/scalar.h"

namespace mlloss {

// sum of factor * e^value over some elements, as e^largest * sum: neither overflows. Without
// default values, so that arrays of it may be in shared memory.
template <class Real>
struct ScaledSum {
  Real largest;
  Real sum;

  MLLOSS_MATH static ScaledSum empty() { return {-kInfinity<Real>, Real(0)}; }
};

// The two sums of a row, or of a part of it.
template <class Real>
struct RowSums {
  ScaledSum<Real> positive, negative;

  MLLOSS_MATH static RowSums empty() {
    return {ScaledSum<Real>::empty(), ScaledSum<Real>::empty()};
  }
};

// What is subtracted before exponentiating. An infinite maximum is not: inf - inf would be NaN, and
// the sums should come out as 0 and inf.
template <class Real>
MLLOSS_MATH Real shift_of(Real largest) {
  return absolute(largest) == kInfinity<Real> ? Real(0) : largest;
}

template <class Real>
MLLOSS_MATH ScaledSum<Real> combine(ScaledSum<Real> a, ScaledSum<Real> b) {
  const Real largest = a.largest > b.largest ? a.largest : b.largest;
  const Real shift = shift_of(largest);
  // A sum of 0 is skipped: its factor may be infinite when the other maximum is.
  const Real a_part = a.sum == 0 ? Real(0) : a.sum * Real(std::exp(shift_of(a.largest) - shift));
  const Real b_part = b.sum == 0 ? Real(0) : b.sum * Real(std::exp(shift_of(b.largest) - shift));
  return {largest, a_part + b_part};
}

template <class Real>
MLLOSS_MATH RowSums<Real> combine(const RowSums<Real>& a, const RowSums<Real>& b) {
  return {combine(a.positive, b.positive), combine(a.negative, b.negative)};
}

// Everything the gradient of a row needs: d/dx_i = -y_i k_p e^(-x_i - m_p) + (1 - y_i) k_n e^(x_i -
// m_n). The maxima are logits (or s0) and therefore exact; their difference to a logit is as well.
template <class Real>
struct RowStatistics {
  Real positive_shift;   // m_p
  Real positive_factor;  // k_p
  Real negative_shift;   // m_n
  Real negative_factor;  // k_n
};

// The nearest number that can be subtracted from a logit. Rounded to Real, unlike its argument.
template <class Real, class Sum>
MLLOSS_MATH Real finite(Sum value) {
  constexpr Real kMost = std::numeric_limits<Real>::max();
  return value > kMost ? kMost : value < -kMost ? -kMost : static_cast<Real>(value);
}

// a + b, and what rounding has lost of it.
template <class Real>
struct ExactSum {
  Real sum, lost;

  MLLOSS_MATH ExactSum(Real a, Real b) {
    sum = a + b;
    const Real b_part = sum - a;
    lost = (a - (sum - b_part)) + (b - b_part);
    if (!(absolute(sum) < kInfinity<Real>)) lost = 0;  // inf - inf
  }
};

// log(1 + u) and u / (1 + u) for u = sum e^exponent >= 0. Both keep their relative precision where
// they are tiny, in fp32 as well: nothing is subtracted.
template <class Real>
struct Softplus {
  Real value, slope;

  MLLOSS_MATH Softplus(Real sum, ExactSum<Real> exponent) {
    // From here on the 1 hardly matters, and u may overflow; where the sum is infinite, e^exponent
    // may be 0.
    constexpr Real kFar = 32;
    const Real e = exp_nonpositive(-absolute(exponent.sum));
    if (sum == 0) {
      value = slope = 0 * e;  // NaN stays NaN
    } else if (exponent.sum > kFar || sum == kInfinity<Real>) {
      value = exponent.sum + (exponent.lost + Real(std::log(sum + e)));
      slope = 1 / (1 + e / sum);
    } else {
      const Real power = exponent.sum > 0 ? 1 / e : e;
      const Real u = sum * (power + power * exponent.lost);
      value = log1p_nonnegative(u);
      slope = 1 / (1 + 1 / u);
    }
  }
};

#if !MLLOSS_DEVICE_MATH
// In fp32 without branches, so that loops over rows become vectors.
template <>
struct Softplus<float> {
  float value, slope;

  MLLOSS_MATH Softplus(float sum, ExactSum<float> exponent) {
    constexpr float kFar = 32;
    const float e = exp_nonpositive(-absolute(exponent.sum));
    const bool is_far = exponent.sum > kFar || sum == kInfinity<float>;
    const float power = exponent.sum > 0 ? 1 / e : e;
    const float u = sum * (power + power * exponent.lost);
    // One logarithm for both cases: that of `total` plus what rounding has lost of it.
    const float larger = is_far ? sum : u < 1 ? 1.0f : u;
    const float smaller = is_far ? e : u < 1 ? u : 1.0f;
    const float total = larger + smaller;
    const float logarithm = log_of_sum(total, smaller - (total - larger));
    const float far_value = exponent.sum + (exponent.lost + logarithm);
    const float slope_if_any = 1 / (1 + (is_far ? e / sum : 1 / u));
    value = sum == 0 ? 0 * e : is_far ? far_value : logarithm;
    slope = sum == 0 ? 0 * e : slope_if_any;
  }
};
#endif

struct MultilabelCategoricalCrossentropy {
  static constexpr bool kHasThreshold = true;

  // The sums of one row. Returns L.
  template <class Sum, class Real>
  MLLOSS_MATH static Sum finish(ScaledSum<Sum> positive, ScaledSum<Sum> negative, Sum threshold,
                                RowStatistics<Real>* statistics) {
    return side(positive, -threshold, &statistics->positive_shift, &statistics->positive_factor) +
           side(negative, threshold, &statistics->negative_shift, &statistics->negative_factor);
  }

  // dL/ds0.
  template <class Real>
  MLLOSS_MATH static Real threshold_gradient(const RowStatistics<Real>& statistics,
                                             Real threshold) {
    return statistics.negative_factor * Real(std::exp(threshold - statistics.negative_shift)) -
           statistics.positive_factor * Real(std::exp(-threshold - statistics.positive_shift));
  }

  // The same of a finite threshold, which is not beyond the shifts.
  MLLOSS_MATH static float finite_threshold_gradient(const RowStatistics<float>& statistics,
                                                     float threshold) {
    return statistics.negative_factor * exp_nonpositive(threshold - statistics.negative_shift) -
           statistics.positive_factor * exp_nonpositive(-threshold - statistics.positive_shift);
  }

 private:
  // softplus(log-sum - own) = log(e^own + e^(log-sum)) - own, and that log-sum-exp's parts.
  template <class Sum, class Real>
  MLLOSS_MATH static Sum side(ScaledSum<Sum> sum, Sum own, Real* shift, Real* factor) {
    const Sum largest = sum.sum == 0 ? -kInfinity<Sum> : shift_of(sum.largest);
    const ExactSum<Sum> difference(sum.sum == 0 ? Sum(0) : largest, -own);
    const Sum e = exp_nonpositive(-absolute(largest - own));
    // Relative to the larger of e^own and e^largest.
    const bool own_is_larger = !(largest > own);
    *shift = finite<Real>(own_is_larger ? own : largest);
    *factor = static_cast<Real>(1 / (own_is_larger ? 1 + sum.sum * e : e + sum.sum));
    return Softplus<Sum>(sum.sum, difference).value;
  }
};

}  // namespace mlloss
