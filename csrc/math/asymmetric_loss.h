// Asymmetric loss of a logit x and a target y in [0, 1], p = sigmoid(x), q = sigmoid(-x):
//
//   L  = y L+ + (1 - y) L-
//   L+ = q^gamma_pos softplus(-x)
//   L- = pm^gamma_neg (-log(1 - pm)),  pm = max(p - clip, 0)
//
//   dL+/dx = -q^gamma_pos (q + gamma_pos p softplus(-x))
//   dL-/dx = (gamma_neg pm^gamma_neg (-log(1 - pm) / pm) + pm^gamma_neg / (1 - pm)) p q, where
//            p > clip, else 0
//
// detach_focal leaves out the derivative of the powers: -q^(gamma_pos + 1) and
// pm^gamma_neg / (1 - pm) p q. Ridnik et al., "Asymmetric Loss For Multi-Label Classification",
// arXiv:2009.14119.
//
// p - clip cancels where p is near clip. Here pm = p (1 - clip) (1 - e^-d), d = x - logit(clip),
// which does not, and 1 - pm = q + clip.
#pragma once
#include <cmath>

#include "math/power.h"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss {

template <class Real_>
struct AsymmetricLoss {
  using Real = Real_;
  static constexpr int kParameters = 0;
  using Parameters = ElementParameters<Real, kParameters>;
  static constexpr bool kIsSoftplus = false;

  Power<Real> negative_power = {};
  Power<Real> positive_power = {};
  Real clip = 0;
  Real rest = 1;  // 1 - clip
  // logit(clip) as a sum of two numbers: x minus it keeps its digits however small it is.
  Real logit_high = 0;
  Real logit_low = 0;
  bool detach_focal = false;

  static AsymmetricLoss from(const PointwiseProblem& problem) {
    const double clip = problem.numbers[2];
    const double logit = clip > 0 ? std::log(clip) - std::log1p(-clip) : 0;
    const Real high = static_cast<Real>(logit);
    return {Power<Real>::of(static_cast<Real>(problem.numbers[0])),
            Power<Real>::of(static_cast<Real>(problem.numbers[1])),
            static_cast<Real>(clip),
            static_cast<Real>(1 - clip),
            high,
            static_cast<Real>(logit - high),
            problem.numbers[3] != 0};
  }

  MLLOSS_MATH Real loss(Real x, bool positive, const Parameters&) const {
    const Sides sides = sides_of(x);
    return positive ? positive_modulation(sides) * sides.falling
                    : negative_modulation(sides) * sides.negative;
  }

  MLLOSS_MATH Real gradient(Real x, bool positive, const Parameters&) const {
    const Sides sides = sides_of(x);
    return positive ? positive_gradient(sides) : negative_gradient(sides);
  }

  MLLOSS_MATH Real soft_loss(Real x, Real y, const Parameters&) const {
    const Sides sides = sides_of(x);
    return (y == 0 ? Real(0) : y * positive_modulation(sides) * sides.falling) +
           (y == 1 ? Real(0) : (1 - y) * negative_modulation(sides) * sides.negative);
  }

  MLLOSS_MATH Real soft_gradient(Real x, Real y, const Parameters&) const {
    const Sides sides = sides_of(x);
    return (y == 0 ? Real(0) : y * positive_gradient(sides)) +
           (y == 1 ? Real(0) : (1 - y) * negative_gradient(sides));
  }

 private:
  struct Sides {
    SigmoidPair<Real> sigmoid;
    Real rising;    // softplus(x) = -log q
    Real falling;   // softplus(-x) = -log p
    Real pm;        // max(p - clip, 0)
    Real negative;  // -log(1 - pm)
  };

  MLLOSS_MATH Sides sides_of(Real x) const {
    const Real e = exp_nonpositive(-absolute(x));
    const Real logarithm = log1p_nonnegative(e);
    Sides sides;
    sides.sigmoid = sigmoid_pair(x, e);
    sides.rising = positive_part(x) + logarithm;
    sides.falling = positive_part(-x) + logarithm;
    if (clip == 0) {
      sides.pm = sides.sigmoid.p;
      sides.negative = sides.rising;
    } else {
      const Real d = (x - logit_high) - logit_low;
      sides.pm = sides.sigmoid.p * (rest * -expm1_nonpositive(d <= 0 ? Real(0) : -d));
      // As log(1 + pm / (1 - pm)), which keeps its digits for small and for large pm.
      sides.negative = log1p_nonnegative(sides.pm / (sides.sigmoid.q + clip));
    }
    return sides;
  }

  MLLOSS_MATH Real positive_modulation(const Sides& sides) const {
    return positive_power(sides.sigmoid.q, sides.rising);
  }

  MLLOSS_MATH Real negative_modulation(const Sides& sides) const {
    return negative_power(sides.pm, clip == 0 ? sides.falling : -log_unit(sides.pm));
  }

  MLLOSS_MATH Real positive_gradient(const Sides& sides) const {
    const SigmoidPair<Real> sigmoid = sides.sigmoid;
    const Real modulation = positive_modulation(sides);
    // p softplus(-x) -> 0 where softplus(-x) is infinite.
    const Real tail = detach_focal || sigmoid.p == 0
                          ? Real(0)
                          : positive_power.exponent * sigmoid.p * sides.falling;
    return -modulation * (sigmoid.q + tail);
  }

  MLLOSS_MATH Real negative_gradient(const Sides& sides) const {
    const SigmoidPair<Real> sigmoid = sides.sigmoid;
    const Real modulation = negative_modulation(sides);
    if (clip == 0) {
      const Real tail = detach_focal || sigmoid.q == 0
                            ? Real(0)
                            : negative_power.exponent * sigmoid.q * sides.negative;
      return modulation * (sigmoid.p + tail);
    }
    const Real focal =
        detach_focal ? Real(0) : negative_power.exponent * (sides.negative / sides.pm);
    const Real value = modulation * (focal + Real(1) / (sigmoid.q + clip)) * sigmoid.p * sigmoid.q;
    return sides.pm == 0 ? Real(0) : value;
  }
};

}  // namespace mlloss
