// Powers with exponents >= 0 of numbers in [0, 1], as focal losses need them.
#pragma once
#include "math/scalar.h"

namespace mlloss {

// base^exponent = base^whole * base^fraction. The whole part, up to 7, is multiplied out, which is
// exact to a few roundings and cheap for the usual 1, 2 and 4. The rest goes through the logarithm,
// whose error counts in proportion to its size: keeping that exponent small keeps the digits.
//
// Without branches, so that loops vectorise. kFraction = false is for exponents that are known to
// be whole.
template <class Real, bool kFraction>
struct Power {
  Real exponent = 0;
  Real fraction = 0;
  // The bits of the whole part, each 0 or 1.
  Real ones = 0, twos = 0, fours = 0;

  // In the place of larger exponents and logarithms: finite, as 0 times it has to be 0.
  static constexpr Real kMost = 1e30f;

  MLLOSS_MATH static Power of(Real given) {
    const Real exponent = given > kMost ? kMost : given;
    const int whole = exponent < Real(7) ? static_cast<int>(exponent) : 7;
    return {exponent, exponent - static_cast<Real>(whole), static_cast<Real>(whole & 1),
            static_cast<Real>(whole >> 1 & 1), static_cast<Real>(whole >> 2 & 1)};
  }

  Power<Real, false> without_fraction() const { return {exponent, Real(0), ones, twos, fours}; }

  // `minus_log` gives -log(base), and is called only where there may be a fraction. It may be
  // infinite for base = 0. 0^0 is 1.
  template <class MinusLog>
  MLLOSS_MATH Real operator()(Real base, const MinusLog& minus_log) const {
    const Real square = base * base;
    const Real whole = (ones * base + (1 - ones)) * (twos * square + (1 - twos)) *
                       (fours * (square * square) + (1 - fours));
    if constexpr (!kFraction) return whole;
    const Real logarithm = minus_log();
    return whole * exp_nonpositive(-(fraction * (logarithm > kMost ? kMost : logarithm)));
  }
};

}  // namespace mlloss
