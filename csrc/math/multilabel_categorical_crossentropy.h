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

// Everything the gradient of a row needs: d/dx_i = -y_i k_p e^(-x_i - m_p) + (1 - y_i) k_n e^(x_i -
// m_n). The maxima are logits (or s0) and therefore exact; their difference to a logit is as well.
template <class Real>
struct RowStatistics {
  Real positive_shift;   // m_p
  Real positive_factor;  // k_p
  Real negative_shift;   // m_n
  Real negative_factor;  // k_n
};

struct MultilabelCategoricalCrossentropy {
  static constexpr bool kHasThreshold = true;

  // The sums of one row, in fp64 since this happens once per row. Returns L.
  template <class Real>
  MLLOSS_MATH static double finish(ScaledSum<double> positive, ScaledSum<double> negative,
                                   double threshold, RowStatistics<Real>* statistics) {
    const double loss =
        side(positive, -threshold, &statistics->positive_shift, &statistics->positive_factor) +
        side(negative, threshold, &statistics->negative_shift, &statistics->negative_factor);
    return loss;
  }

  // dL/ds0.
  template <class Real>
  MLLOSS_MATH static Real threshold_gradient(const RowStatistics<Real>& statistics,
                                             Real threshold) {
    return statistics.negative_factor * Real(std::exp(threshold - statistics.negative_shift)) -
           statistics.positive_factor * Real(std::exp(-threshold - statistics.positive_shift));
  }

 private:
  // softplus(log-sum - own) = log(e^own + e^(log-sum)) - own, and that log-sum-exp's parts.
  template <class Real>
  MLLOSS_MATH static double side(ScaledSum<double> sum, double own, Real* shift, Real* factor) {
    const ScaledSum<double> with_own = combine(sum, ScaledSum<double>{own, 1.0});
    *shift = static_cast<Real>(shift_of(with_own.largest));
    *factor = static_cast<Real>(1.0 / with_own.sum);
    const double difference = std::log(sum.sum) + shift_of(sum.largest) - own;
    const double magnitude = absolute(difference);
    return positive_part(difference) + std::log1p(std::exp(-magnitude));
  }
};

}  // namespace mlloss
