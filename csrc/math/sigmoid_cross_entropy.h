// Sigmoid cross-entropy of a logit x and a target y in [0, 1], softplus(z) = log(1 + e^z):
//
//   L     = pos_weight y softplus(-x) + (1 - y) softplus(x)
//   dL/dx = (1 - y) p - pos_weight y q,  p = sigmoid(x), q = sigmoid(-x)
//
// with softplus(z) = max(z, 0) + log1p(exp(-|z|)), which keeps every digit of confident negatives.
// The same function as torch.nn.functional.binary_cross_entropy_with_logits.
//
// This header is also the model for others. A pointwise loss offers kParameters (constants per
// element), from() (its constants from a problem), and value and derivative for hard targets (bool)
// and soft ones (numbers in [0, 1]; at 0 and 1 the same as for hard ones).
#pragma once
#include "math/scalar.h"
#include "problem.h"

namespace mlloss {

template <class Real_>
struct SigmoidCrossEntropy {
  using Real = Real_;
  static constexpr int kParameters = 1;  // pos_weight
  using Parameters = ElementParameters<Real, kParameters>;

  // Without parameters L = softplus(z), z = x for negatives and -x for positives, so loops may take
  // the logarithms of many elements at once: log1p(e_1) + log1p(e_2) + ... = log1p(q) with
  // q <- q + e + q e, e = exp(-|x|).
  static constexpr bool kIsSoftplus = true;

  static SigmoidCrossEntropy from(const PointwiseProblem&) { return {}; }

  MLLOSS_MATH Real loss(Real x, bool positive, const Parameters& parameters) const {
    const Real z = positive ? -x : x;
    const Real value = positive_part(z) + log1p_nonnegative(exp_nonpositive(-absolute(z)));
    return positive ? parameters.value[0] * value : value;
  }

  MLLOSS_MATH Real gradient(Real x, bool positive, const Parameters& parameters) const {
    const Real z = positive ? -x : x;
    const Real p = sigmoid_pair(z, exp_nonpositive(-absolute(z))).p;
    return positive ? -parameters.value[0] * p : p;
  }

  // Selected rather than multiplied: an infinite logit on its right side costs 0.
  MLLOSS_MATH Real soft_loss(Real x, Real y, const Parameters& parameters) const {
    const Real logarithm = log1p_nonnegative(exp_nonpositive(-absolute(x)));
    const Real positive =
        y == 0 ? Real(0) : parameters.value[0] * y * (positive_part(-x) + logarithm);
    const Real negative = y == 1 ? Real(0) : (1 - y) * (positive_part(x) + logarithm);
    return positive + negative;
  }

  MLLOSS_MATH Real soft_gradient(Real x, Real y, const Parameters& parameters) const {
    const SigmoidPair<Real> sigmoid = sigmoid_pair(x, exp_nonpositive(-absolute(x)));
    return (1 - y) * sigmoid.p - parameters.value[0] * y * sigmoid.q;
  }

  // What log1p(exp(-|x|)) lacks of the loss of a soft target without parameters.
  MLLOSS_MATH static Real linear_part(Real x, Real y) {
    const Real factor = x < 0 ? -y : Real(1) - y;
    return factor == 0 ? Real(0) : factor * x;
  }
};

}  // namespace mlloss
