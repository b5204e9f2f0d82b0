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

template <class Real_>
struct SigmoidFocalLoss {
  using Real = Real_;
  static constexpr int kParameters = 3;  // pos_weight, alpha, gamma
  using Parameters = ElementParameters<Real, kParameters>;
  static constexpr bool kIsSoftplus = false;

  // Where alpha and gamma are numbers: alpha, 1 - alpha (1, 1 without alpha), gamma.
  Real positive_factor = 1;
  Real negative_factor = 1;
  Power<Real> power = {};
  bool alpha_varies = false;
  bool gamma_varies = false;

  static SigmoidFocalLoss from(const PointwiseProblem& problem) {
    return {static_cast<Real>(problem.numbers[0]), static_cast<Real>(problem.numbers[1]),
            Power<Real>::of(static_cast<Real>(problem.numbers[2])),
            problem.parameters[1].data != nullptr, problem.parameters[2].data != nullptr};
  }

  MLLOSS_MATH Real positive_alpha(const Parameters& parameters) const {
    const Real alpha = parameters.value[1];
    return !alpha_varies ? positive_factor : alpha <= 1 ? alpha : kNaN<Real>;
  }

  MLLOSS_MATH Real negative_alpha(const Parameters& parameters) const {
    const Real alpha = parameters.value[1];
    return !alpha_varies ? negative_factor : alpha <= 1 ? 1 - alpha : kNaN<Real>;
  }

  MLLOSS_MATH Power<Real> power_of(const Parameters& parameters) const {
    return gamma_varies ? Power<Real>::of(parameters.value[2]) : power;
  }

  MLLOSS_MATH Real hard_factor(bool positive, const Parameters& parameters) const {
    return positive ? parameters.value[0] * positive_alpha(parameters) : negative_alpha(parameters);
  }

  // Hard targets: with z = x for negatives and -x for positives, L = a p^gamma softplus(z).
  MLLOSS_MATH Real loss(Real x, bool positive, const Parameters& parameters) const {
    const Real z = positive ? -x : x;
    const Real e = exp_nonpositive(-absolute(z));
    const Real logarithm = log1p_nonnegative(e);
    const Real modulation =
        power_of(parameters)(sigmoid_pair(z, e).p, positive_part(-z) + logarithm);
    return hard_factor(positive, parameters) * modulation * (positive_part(z) + logarithm);
  }

  MLLOSS_MATH Real gradient(Real x, bool positive, const Parameters& parameters) const {
    const Real z = positive ? -x : x;
    const Real e = exp_nonpositive(-absolute(z));
    const Real logarithm = log1p_nonnegative(e);
    const SigmoidPair<Real> sigmoid = sigmoid_pair(z, e);
    const Power<Real> gamma = power_of(parameters);
    const Real modulation = gamma(sigmoid.p, positive_part(-z) + logarithm);
    // q softplus(z) -> 0 where softplus(z) is infinite.
    const Real tail =
        sigmoid.q == 0 ? Real(0) : gamma.exponent * sigmoid.q * (positive_part(z) + logarithm);
    const Real value = hard_factor(positive, parameters) * modulation * (sigmoid.p + tail);
    return positive ? -value : value;
  }

  MLLOSS_MATH Real soft_loss(Real x, Real y, const Parameters& parameters) const {
    const Terms terms = terms_of(x, y, parameters);
    return terms.factor * terms.cross_entropy;
  }

  MLLOSS_MATH Real soft_gradient(Real x, Real y, const Parameters& parameters) const {
    const Terms terms = terms_of(x, y, parameters);
    const Real slope = (1 - y) * terms.sigmoid.p - parameters.value[0] * y * terms.sigmoid.q;
    // p q / m as 1 / (y / p + (1 - y) / q).
    const Real ratio = y == 0   ? terms.sigmoid.q
                       : y == 1 ? terms.sigmoid.p
                                : Real(1) / (y / terms.sigmoid.p + (1 - y) / terms.sigmoid.q);
    const Real tail =
        ratio == 0 ? Real(0)
                   : power_of(parameters).exponent * terms.cross_entropy * (1 - 2 * y) * ratio;
    return terms.factor * (slope + tail);
  }

 private:
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
    const Real minus_log = y == 0 ? falling : y == 1 ? rising : -log_unit(m);
    const Real alpha = y == 0 ? negative_alpha(parameters)
                       : y == 1
                           ? positive_alpha(parameters)
                           : y * positive_alpha(parameters) + (1 - y) * negative_alpha(parameters);
    const Real cross_entropy = (y == 0 ? Real(0) : parameters.value[0] * y * falling) +
                               (y == 1 ? Real(0) : (1 - y) * rising);
    return {alpha * power_of(parameters)(m, minus_log), cross_entropy, sigmoid};
  }
};

}  // namespace mlloss
