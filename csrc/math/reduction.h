// What a reduced loss is divided by.
#pragma once
#include <cmath>
#include <cstdint>

#include "math/scalar.h"
#include "problem.h"

namespace mlloss {

// `counted` is what the reductions that count have counted, `batch` the N of 'batchmean'. Not a
// number where a normalizer cannot be a denominator.
MLLOSS_MATH double denominator_of(Reduction reduction, double counted, int64_t batch,
                                  const double* normalizer) {
  switch (reduction) {
    case Reduction::kNone:
    case Reduction::kSum:
      return 1;
    case Reduction::kBatchMean:
      return static_cast<double>(batch);
    case Reduction::kNormalizer:
      return *normalizer >= 0 && *normalizer < kInfinity<double> ? *normalizer : kNaN<double>;
    default:
      return counted;
  }
}

// What one row of a row-wise loss adds to `counted`.
MLLOSS_MATH double counted_row(Reduction reduction, double weight) {
  if (reduction == Reduction::kMeanNonzero) return weight != 0 ? 1 : 0;
  return reduction == Reduction::kWeightedMean ? weight : 1;
}

// The factor of the gradient of the sum. A denominator of 0 gives loss 0 and gradient 0.
MLLOSS_MATH double scale_of(double denominator) { return denominator == 0 ? 0 : 1 / denominator; }

}  // namespace mlloss
