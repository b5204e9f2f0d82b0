// Sigmoid cross-entropy of a logit x and a target y in [0, 1], softplus(z) = log(1 + e^z):
//
//   L     = pos_weight y softplus(-x) + (1 - y) softplus(x)
//   dL/dx = (1 - y) p - pos_weight y q,  p = sigmoid(x), q = sigmoid(-x)
//
// with softplus(z) = max(z, 0) + log1p(exp(-|z|)), which keeps every digit of confident negatives.
// The same function as torch.nn.functional.binary_cross_entropy_with_logits.
#pragma once
#include "math/scalar.h"

namespace mlloss {

template <class Real_>
struct SigmoidCrossEntropy {
  using Real = Real_;

  // Label smoothing e: the target becomes y (1 - e) + e / 2 (TensorFlow, Keras).
  Real low = 0;   // what y = 0 becomes
  Real span = 1;  // the target becomes low + y * span

  static SigmoidCrossEntropy with_smoothing(double label_smoothing) {
    return {static_cast<Real>(label_smoothing / 2), static_cast<Real>(1 - label_smoothing)};
  }

  // Whether targets of 0 and 1 stay 0 and 1.
  MLLOSS_MATH bool keeps_hard_targets() const { return span == Real(1); }

  MLLOSS_MATH Real smoothed(Real y) const { return low + y * span; }

  // Without pos_weight, L = linear_part + log1p(e), e = exp(-|x|): the logarithms of many elements
  // can be taken at once, log1p(e_1) + log1p(e_2) + ... = log1p(q) with q <- q + e + q e.
  // `y` is smoothed. Selected rather than multiplied: an infinite logit on its right side costs 0.
  MLLOSS_MATH Real linear_part(Real x, Real y) const {
    const Real factor = x < 0 ? -y : Real(1) - y;
    return factor == 0 ? Real(0) : factor * x;
  }

  // `y` is smoothed.
  MLLOSS_MATH Real loss(Real x, Real y, Real pos_weight) const {
    const Real logarithm = log1p_nonnegative(exp_nonpositive(-absolute(x)));
    const Real positive = y == 0 ? Real(0) : pos_weight * y * (positive_part(-x) + logarithm);
    const Real negative = y == 1 ? Real(0) : (1 - y) * (positive_part(x) + logarithm);
    return positive + negative;
  }

  // `y` is smoothed.
  MLLOSS_MATH Real gradient(Real x, Real y, Real pos_weight) const {
    const SigmoidPair<Real> sigmoid = sigmoid_pair(x, exp_nonpositive(-absolute(x)));
    return (1 - y) * sigmoid.p - pos_weight * y * sigmoid.q;
  }
};

}  // namespace mlloss
