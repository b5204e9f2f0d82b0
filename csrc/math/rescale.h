// What a gradient that was written in the forward pass is multiplied by in the backward pass.
#pragma once
#include "math/scalar.h"

namespace mlloss {

// The gradient holds `gradient_scale` (nullptr = 1) times the derivative, and `grad_output` has
// come from above. 1 where they are the same: there is nothing to do then.
MLLOSS_MATH double rescaling_factor(double grad_output, const double* gradient_scale) {
  return gradient_scale == nullptr ? grad_output : grad_output / *gradient_scale;
}

// Zeros stay: a masked element does so whatever comes from above.
template <class Real>
MLLOSS_MATH Real rescaled(Real gradient, Real factor) {
  return gradient == 0 ? gradient : gradient * factor;
}

}  // namespace mlloss
