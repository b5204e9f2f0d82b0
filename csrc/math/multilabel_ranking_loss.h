// Multi-label ranking loss (log-sum-exp pairwise, LSEP) of one row of logits x with targets y in
// [0, 1]:
//
//   L = log(1 + sum_ij y_i (1 - y_j) e^(x_j - x_i)) = softplus(A + B)
//   A = log sum_i y_i e^-x_i,  B = log sum_j (1 - y_j) e^x_j  (-inf for an empty sum)
//
// Li, Song and Luo, "Improving Pairwise Ranking for Multi-label Image Classification",
// arXiv:1704.03135. Without positives or without negatives L and its gradient are 0.
//
// Gradients, with s = sigmoid(A + B): dL/dx_i = s (-y_i e^(-x_i - A) + (1 - y_i) e^(x_i - B)).
#pragma once
#include "math/multilabel_categorical_crossentropy.h"
#include "math/scalar.h"

namespace mlloss {

struct MultilabelRankingLoss {
  static constexpr bool kHasThreshold = false;

  // The sums of one row. Returns L.
  template <class Sum, class Real>
  MLLOSS_MATH static Sum finish(ScaledSum<Sum> positive, ScaledSum<Sum> negative, Sum /*threshold*/,
                                RowStatistics<Real>* statistics) {
    const Sum positive_shift = shift_of(positive.largest);
    const Sum negative_shift = shift_of(negative.largest);
    statistics->positive_shift = static_cast<Real>(positive_shift);
    statistics->negative_shift = static_cast<Real>(negative_shift);
    if (positive.sum == 0 || negative.sum == 0) {
      // NaN on one side counts although the other is empty.
      const bool valid = positive.sum == positive.sum && negative.sum == negative.sum;
      const Sum loss = valid ? Sum(0) : kNaN<Sum>;
      statistics->positive_factor = statistics->negative_factor = static_cast<Real>(loss);
      return loss;
    }
    const Softplus<Sum> softplus(positive.sum * negative.sum,
                                 ExactSum<Sum>(positive_shift, negative_shift));
    statistics->positive_factor = static_cast<Real>(softplus.slope / positive.sum);
    statistics->negative_factor = static_cast<Real>(softplus.slope / negative.sum);
    return softplus.value;
  }
};

}  // namespace mlloss
