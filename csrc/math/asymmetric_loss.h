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
#include <limits>

#include "math/power.h"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss {

// kFraction = false: both powers are whole.
template <class Real_, bool kFraction = true>
struct AsymmetricLoss {
  using Real = Real_;
  static constexpr int kParameters = 0;
  using Parameters = ElementParameters<Real, kParameters>;
  static constexpr bool kIsSoftplus = false;

  Power<Real, kFraction> negative_power = {};
  Power<Real, kFraction> positive_power = {};
  // What the gradient has in the place of the powers' exponents: 0 with detach_focal.
  Real negative_slope = 0;
  Real positive_slope = 0;
  Real clip = 0;
  Real rest = 1;  // 1 - clip
  // logit(clip) as a sum of two numbers: x minus it keeps its digits however small it is.
  Real logit_high = kNoClip;
  Real logit_low = 0;

  static AsymmetricLoss from(const PointwiseProblem& problem) {
    const double clip = problem.numbers[2];
    const double logit = clip > 0 ? std::log(clip) - std::log1p(-clip) : kNoClip;
    const Real high = static_cast<Real>(logit);
    const Real focal = problem.numbers[3] != 0 ? Real(0) : Real(1);
    const auto negative_power = Power<Real, kFraction>::of(static_cast<Real>(problem.numbers[0]));
    const auto positive_power = Power<Real, kFraction>::of(static_cast<Real>(problem.numbers[1]));
    return {negative_power,
            positive_power,
            focal * negative_power.exponent,
            focal * positive_power.exponent,
            static_cast<Real>(clip),
            static_cast<Real>(1 - clip),
            high,
            static_cast<Real>(logit - high)};
  }

  // Calls run(loss) with the cheapest form of this loss: the CPU loops run on that.
  template <class Run>
  MLLOSS_MATH auto specialize(const Run& run) const {
    using Whole = AsymmetricLoss<Real, false>;
    if (negative_power.fraction != 0 || positive_power.fraction != 0) return run(*this);
    return run(Whole{negative_power.without_fraction(), positive_power.without_fraction(),
                     negative_slope, positive_slope, clip, rest, logit_high, logit_low});
  }

  MLLOSS_MATH Real loss(Real x, bool positive, const Parameters&) const {
    const Sides sides = sides_of(x);
    const Real on_positive = positive_modulation(sides) * sides.falling;
    const Real on_negative = negative_modulation(sides) * sides.negative;
    return positive ? on_positive : on_negative;
  }

  MLLOSS_MATH Real gradient(Real x, bool positive, const Parameters&) const {
    const Sides sides = sides_of(x);
    const Real on_positive = positive_gradient(sides), on_negative = negative_gradient(sides);
    return positive ? on_positive : on_negative;
  }

  MLLOSS_MATH Real soft_loss(Real x, Real y, const Parameters&) const {
    const Sides sides = sides_of(x);
    const Real on_positive = y * positive_modulation(sides) * sides.falling;
    const Real on_negative = (1 - y) * negative_modulation(sides) * sides.negative;
    return (y == 0 ? Real(0) : on_positive) + (y == 1 ? Real(0) : on_negative);
  }

  MLLOSS_MATH Real soft_gradient(Real x, Real y, const Parameters&) const {
    const Sides sides = sides_of(x);
    const Real on_positive = y * positive_gradient(sides);
    const Real on_negative = (1 - y) * negative_gradient(sides);
    return (y == 0 ? Real(0) : on_positive) + (y == 1 ? Real(0) : on_negative);
  }

 private:
  // In the place of logit(0): below every finite logit, but finite, as -inf minus it has to be
  // -inf.
  static constexpr Real kNoClip = Real(-3e38f);

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
    const Real d = (x - logit_high) - logit_low;
    sides.pm = sides.sigmoid.p * (rest * -expm1_nonpositive(d <= 0 ? Real(0) : -d));
    // -log(1 - pm) as log(1 + pm / (1 - pm)), which keeps its digits for small and for large pm.
    const Real ratio = sides.pm / (sides.sigmoid.q + clip);
    const Real small = log1p_nonnegative(ratio);
    sides.negative = ratio > Real(1e30f) ? sides.rising : small;  // without clip, pm / q = e^x
    return sides;
  }

  MLLOSS_MATH Real positive_modulation(const Sides& sides) const {
    return positive_power(sides.sigmoid.q, [&] { return sides.rising; });
  }

  MLLOSS_MATH Real negative_modulation(const Sides& sides) const {
    return negative_power(sides.pm, [&] { return -log_unit(sides.pm); });
  }

  MLLOSS_MATH Real positive_gradient(const Sides& sides) const {
    const SigmoidPair<Real> sigmoid = sides.sigmoid;
    // p softplus(-x) -> 0 where softplus(-x) is infinite.
    const Real product = positive_slope * sigmoid.p * sides.falling;
    const Real tail = sigmoid.p == 0 ? Real(0) : product;
    return -positive_modulation(sides) * (sigmoid.q + tail);
  }

  MLLOSS_MATH Real negative_gradient(const Sides& sides) const {
    const SigmoidPair<Real> sigmoid = sides.sigmoid;
    const Real product = negative_slope * (sides.negative / sides.pm) * sigmoid.p * sigmoid.q;
    const Real tail = sigmoid.q == 0 ? Real(0) : product;
    // q / (1 - pm), which is 1 without clip, also where q is 0.
    constexpr Real kTiny = std::numeric_limits<Real>::min();
    const Real share = (sigmoid.q + kTiny) / (sigmoid.q + (clip + kTiny));
    const Real value = negative_modulation(sides) * (tail + sigmoid.p * share);
    return sides.pm == 0 ? Real(0) : value;
  }
};

}  // namespace mlloss
