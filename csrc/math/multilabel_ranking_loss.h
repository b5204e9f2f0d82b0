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

  // The sums of one row, in fp64 since this happens once per row. Returns L.
  template <class Real>
  MLLOSS_MATH static double finish(ScaledSum<double> positive, ScaledSum<double> negative,
                                   double /*threshold*/, RowStatistics<Real>* statistics) {
    statistics->positive_shift = static_cast<Real>(shift_of(positive.largest));
    statistics->negative_shift = static_cast<Real>(shift_of(negative.largest));
    if (positive.sum == 0 || negative.sum == 0) {
      // NaN on one side counts although the other is empty.
      const bool valid = positive.sum == positive.sum && negative.sum == negative.sum;
      const double loss = valid ? 0 : kNaN<double>;
      statistics->positive_factor = statistics->negative_factor = static_cast<Real>(loss);
      return loss;
    }
    const double difference = std::log(positive.sum) + shift_of(positive.largest) +
                              std::log(negative.sum) + shift_of(negative.largest);
    const double magnitude = absolute(difference);
    const double e = std::exp(-magnitude);
    const double slope = sigmoid_pair(difference, e).p;
    statistics->positive_factor = static_cast<Real>(slope / positive.sum);
    statistics->negative_factor = static_cast<Real>(slope / negative.sum);
    return positive_part(difference) + std::log1p(e);
  }
};

}  // namespace mlloss
