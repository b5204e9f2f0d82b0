// The two sums of a row alone, of which losses are functions: for rows whose logits are never all
// there at once. The caller adds up the sums of the parts (mlloss_cuda/row_sums.py) and computes
// the loss from them.
//
// In the place of statistics: largest and sum of the positives, largest and sum of the negatives,
// sum e^value = sum * e^largest.
#pragma once
#include "math/multilabel_categorical_crossentropy.h"
#include "math/scalar.h"

namespace mlloss {

struct RowSumsAlone {
  static constexpr bool kHasThreshold = false;

  // The sums of one row. There is no loss: returns 0.
  template <class Sum, class Real>
  MLLOSS_MATH static Sum finish(ScaledSum<Sum> positive, ScaledSum<Sum> negative, Sum /*threshold*/,
                                RowStatistics<Real>* sums) {
    sums->positive_shift = static_cast<Real>(shift_of(positive.largest));
    sums->positive_factor = static_cast<Real>(positive.sum);
    sums->negative_shift = static_cast<Real>(shift_of(negative.largest));
    sums->negative_factor = static_cast<Real>(negative.sum);
    return Sum(0);
  }
};

}  // namespace mlloss
