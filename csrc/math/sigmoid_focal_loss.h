// Sigmoid focal loss of a logit x and a target y in [0, 1], p = sigmoid(x), q = sigmoid(-x):
//
//   L = a m^gamma CE,  CE = pos_weight y softplus(-x) + (1 - y) softplus(x)
//   m = q y + p (1 - y)  (1 minus the probability of the target)
//   a = alpha y + (1 - alpha) (1 - y), or 1 without alpha
//
//   dL/dx = a m^gamma (dCE/dx + gamma CE (1 - 2 y) p q / m)
//
// Lin et al., "Focal Loss for Dense Object Detection", arXiv:1708.02002; soft targets as in
// torchvision.ops.sigmoid_focal_loss. m is never taken as 1 - p y - q (1 - y), which cancels, and
// p q / m stays finite where m is 0, so the gradient is finite for every gamma >= 0.
#pragma once
#include "math/power.h"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss {

// kFraction = false: gamma is the same for all elements, and whole.
template <class Real_, bool kFraction = true>
struct SigmoidFocalLoss {
  using Real = Real_;
  static constexpr int kParameters = 3;  // pos_weight, alpha, gamma
  using Parameters = ElementParameters<Real, kParameters>;
  static constexpr bool kIsSoftplus = false;

  // alpha, 1 - alpha (1 and 1 without alpha) and gamma: offset + slope * parameter, where the slope
  // is 0 unless the parameter varies.
  Real positive_offset = 1, positive_slope = 0;
  Real negative_offset = 1, negative_slope = 0;
  Real gamma_offset = 0, gamma_slope = 0;
  Power<Real, kFraction> power = {};  // where gamma does not vary

  static SigmoidFocalLoss from(const PointwiseProblem& problem) {
    const bool alpha_varies = problem.parameters[1].data != nullptr;
    const bool gamma_varies = problem.parameters[2].data != nullptr;
    return {alpha_varies ? Real(0) : static_cast<Real>(problem.numbers[0]),
            alpha_varies ? Real(1) : Real(0),
            alpha_varies ? Real(1) : static_cast<Real>(problem.numbers[1]),
            alpha_varies ? Real(-1) : Real(0),
            gamma_varies ? Real(0) : static_cast<Real>(problem.numbers[2]),
            gamma_varies ? Real(1) : Real(0),
            Power<Real, kFraction>::of(static_cast<Real>(problem.numbers[2]))};
  }

  // Calls run(loss) with the cheapest form of this loss: the CPU loops run on that.
  template <class Run>
  MLLOSS_MATH auto specialize(const Run& run) const {
    using Whole = SigmoidFocalLoss<Real, false>;
    if (gamma_slope != 0 || power.fraction != 0) return run(*this);
    return run(Whole{positive_offset, positive_slope, negative_offset, negative_slope, gamma_offset,
                     gamma_slope, power.without_fraction()});
  }

  // Hard targets: with z = x for negatives and -x for positives, L = a p^gamma softplus(z).
  MLLOSS_MATH Real loss(Real x, bool positive, const Parameters& parameters) const {
    const Real z = positive ? -x : x;
    const Real e = exp_nonpositive(-absolute(z));
    const Real logarithm = log1p_nonnegative(e);
    const Real modulation =
        power_of(parameters)(sigmoid_pair(z, e).p, [&] { return positive_part(-z) + logarithm; });
    return scaled(hard_factor(positive, parameters) * modulation, positive_part(z) + logarithm);
  }

  MLLOSS_MATH Real gradient(Real x, bool positive, const Parameters& parameters) const {
    const Real z = positive ? -x : x;
    const Real e = exp_nonpositive(-absolute(z));
    const Real logarithm = log1p_nonnegative(e);
    const SigmoidPair<Real> sigmoid = sigmoid_pair(z, e);
    const Power<Real, kFraction> gamma = power_of(parameters);
    const Real modulation = gamma(sigmoid.p, [&] { return positive_part(-z) + logarithm; });
    // q softplus(z) -> 0 where softplus(z) is infinite.
    const Real product = gamma.exponent * sigmoid.q * (positive_part(z) + logarithm);
    const Real tail = sigmoid.q == 0 ? Real(0) : product;
    const Real value = hard_factor(positive, parameters) * modulation * (sigmoid.p + tail);
    return positive ? -value : value;
  }

  MLLOSS_MATH Real soft_loss(Real x, Real y, const Parameters& parameters) const {
    const Terms terms = terms_of(x, y, parameters);
    return scaled(terms.factor, terms.cross_entropy);
  }

  MLLOSS_MATH Real soft_gradient(Real x, Real y, const Parameters& parameters) const {
    const Terms terms = terms_of(x, y, parameters);
    const SigmoidPair<Real> sigmoid = terms.sigmoid;
    const Real slope = (1 - y) * sigmoid.p - parameters.value[0] * y * sigmoid.q;
    // p q / m as 1 / (y / p + (1 - y) / q).
    const Real inverse = y / sigmoid.p + (1 - y) / sigmoid.q;
    const Real ratio = y == 0 ? sigmoid.q : y == 1 ? sigmoid.p : Real(1) / inverse;
    const Real product = power_of(parameters).exponent * terms.cross_entropy * (1 - 2 * y) * ratio;
    return terms.factor * (slope + (ratio == 0 ? Real(0) : product));
  }

 private:
  // Selected rather than multiplied: the cross-entropy may be infinite.
  MLLOSS_MATH static Real scaled(Real factor, Real cross_entropy) {
    const Real product = factor * cross_entropy;
    return factor == 0 ? Real(0) : product;
  }

  MLLOSS_MATH Real positive_alpha(const Parameters& parameters) const {
    return positive_offset + positive_slope * checked_alpha(parameters);
  }

  MLLOSS_MATH Real negative_alpha(const Parameters& parameters) const {
    return negative_offset + negative_slope * checked_alpha(parameters);
  }

  MLLOSS_MATH static Real checked_alpha(const Parameters& parameters) {
    return parameters.value[1] <= 1 ? parameters.value[1] : kNaN<Real>;
  }

  MLLOSS_MATH Real hard_factor(bool positive, const Parameters& parameters) const {
    const Real positive_factor = parameters.value[0] * positive_alpha(parameters);
    const Real negative_factor = negative_alpha(parameters);
    return positive ? positive_factor : negative_factor;
  }

  MLLOSS_MATH Power<Real, kFraction> power_of(const Parameters& parameters) const {
    if constexpr (!kFraction) return power;
    return Power<Real, kFraction>::of(gamma_offset + gamma_slope * parameters.value[2]);
  }

  struct Terms {
    Real factor;  // a m^gamma
    Real cross_entropy;
    SigmoidPair<Real> sigmoid;
  };

  MLLOSS_MATH Terms terms_of(Real x, Real y, const Parameters& parameters) const {
    const Real e = exp_nonpositive(-absolute(x));
    const Real logarithm = log1p_nonnegative(e);
    const Real rising = positive_part(x) + logarithm;    // softplus(x) = -log q
    const Real falling = positive_part(-x) + logarithm;  // softplus(-x) = -log p
    const SigmoidPair<Real> sigmoid = sigmoid_pair(x, e);
    const Real m = sigmoid.q * y + sigmoid.p * (1 - y);
    const Real alpha = y * positive_alpha(parameters) + (1 - y) * negative_alpha(parameters);
    const Real modulation = power_of(parameters)(m, [&] {
      const Real logarithm_of_m = log_unit(m);
      return y == 0 ? falling : y == 1 ? rising : -logarithm_of_m;
    });
    // Selected rather than multiplied: an infinite logit on its right side costs 0.
    const Real positive = parameters.value[0] * y * falling, negative = (1 - y) * rising;
    const Real cross_entropy = (y == 0 ? Real(0) : positive) + (y == 1 ? Real(0) : negative);
    return {alpha * modulation, cross_entropy, sigmoid};
  }
};

}  // namespace mlloss
