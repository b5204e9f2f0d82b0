// Binary cross-entropy of a probability p and a target y in [0, 1]:
//
//   L     = -(pos_weight y log p + (1 - y) log(1 - p))
//   dL/dp = (1 - y) / (1 - p) - pos_weight y / p
//
// without eps, each logarithm is at least -100 and each denominator at least 1e-12, as in
// torch.nn.functional.binary_cross_entropy; with eps, p is first clipped to [eps, 1 - eps] as in
// Keras, and the gradient is 0 outside of that. Not a number where p is not in [0, 1].
#pragma once
#include <cmath>

#include "math/scalar.h"
#include "problem.h"

namespace mlloss {

template <class Real_>
struct BinaryCrossEntropy {
  using Real = Real_;
  static constexpr int kParameters = 1;  // pos_weight
  using Parameters = ElementParameters<Real, kParameters>;
  static constexpr bool kIsSoftplus = false;

  Real eps = 0;
  Real most = 100;  // what a logarithm is at most, and at least, in magnitude
  Real least = 0;

  static BinaryCrossEntropy from(const PointwiseProblem& problem) {
    const double eps = problem.numbers[0];
    if (eps == 0) return {};
    return {static_cast<Real>(eps), static_cast<Real>(-std::log(eps)),
            static_cast<Real>(-std::log1p(-eps))};
  }

  MLLOSS_MATH Real loss(Real x, bool positive, const Parameters& parameters) const {
    const Real value = limited(x, -log_of_side(x, !positive));
    return positive ? parameters.value[0] * value : value;
  }

  MLLOSS_MATH Real gradient(Real x, bool positive, const Parameters& parameters) const {
    const Real value = slope(x, positive ? x : 1 - x);
    return positive ? -parameters.value[0] * value : value;
  }

  MLLOSS_MATH Real soft_loss(Real x, Real y, const Parameters& parameters) const {
    return parameters.value[0] * y * positive_loss(x) + (1 - y) * negative_loss(x);
  }

  MLLOSS_MATH Real soft_gradient(Real x, Real y, const Parameters& parameters) const {
    return (1 - y) * negative_slope(x) - parameters.value[0] * y * positive_slope(x);
  }

 private:
  // -log p
  MLLOSS_MATH Real positive_loss(Real p) const { return limited(p, -log_unit(p)); }

  // -log(1 - p)
  MLLOSS_MATH Real negative_loss(Real p) const { return limited(p, -log_of_side(p, true)); }

  // Limits to the logarithms of eps and 1 - eps, which clipping p would only give up to the
  // rounding of 1 - eps.
  MLLOSS_MATH Real limited(Real p, Real value) const {
    const Real inside = value > most ? most : value < least ? least : value;
    return p >= 0 && p <= 1 ? inside : kNaN<Real>;
  }

  // 1 / p and 1 / (1 - p), 0 where p is clipped.
  MLLOSS_MATH Real positive_slope(Real p) const { return slope(p, p); }
  MLLOSS_MATH Real negative_slope(Real p) const { return slope(p, 1 - p); }

  MLLOSS_MATH Real slope(Real p, Real denominator) const {
    const Real inside = Real(1) / (denominator < Real(1e-12) ? Real(1e-12) : denominator);
    const Real value = p < eps || 1 - p < eps ? Real(0) : inside;
    return p >= 0 && p <= 1 ? value : kNaN<Real>;
  }
};

}  // namespace mlloss
