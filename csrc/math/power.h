// Powers with exponents >= 0 of numbers in [0, 1], as focal losses need them.
#pragma once
#include "math/scalar.h"

namespace mlloss {

// base^exponent = base^whole * base^fraction. The whole part, up to 7, is multiplied out, which is
// exact to a few roundings and cheap for the usual 1, 2 and 4. The rest goes through the logarithm,
// whose error counts in proportion to its size: keeping that exponent small keeps the digits.
template <class Real>
struct Power {
  Real exponent;
  Real fraction;
  int whole;

  MLLOSS_MATH static Power of(Real exponent) {
    const int whole = exponent < Real(7) ? static_cast<int>(exponent) : 7;
    return {exponent, exponent - static_cast<Real>(whole), whole};
  }

  // `minus_log` is -log(base); base = 0 may come with infinity. 0^0 is 1.
  MLLOSS_MATH Real operator()(Real base, Real minus_log) const {
    const Real square = base * base;
    Real result = (whole & 1) != 0 ? base : Real(1);
    result *= (whole & 2) != 0 ? square : Real(1);
    result *= (whole & 4) != 0 ? square * square : Real(1);
    // NaN stays NaN: a fraction of NaN is not 0.
    return fraction == 0 ? result : result * exp_nonpositive(-(fraction * minus_log));
  }
};

}  // namespace mlloss
