// Every native loss, once: what is declared, bound and registered per loss is generated from these
// lists. ops.cpp has their schemas.
#pragma once

// MLLOSS_POINTWISE_LOSSES(X) expands X(name, tensors, numbers) for every loss that is a sum over
// elements. `tensors` and `numbers`: how many optional tensors and how many numbers of its own
// stand behind the weight in its schema; they become PointwiseProblem::parameters and ::numbers.
#define MLLOSS_POINTWISE_LOSSES(X) \
  X(sigmoid_cross_entropy, 1, 0)   \
  X(binary_cross_entropy, 1, 1)    \
  X(sigmoid_focal_loss, 3, 3)      \
  X(asymmetric_loss, 0, 4)

// MLLOSS_ROWWISE_LOSSES(X) expands X(name, thresholds) for every loss that is a function of two
// sums over a row. `thresholds`: 1 if it has a threshold per row, else 0.
#define MLLOSS_ROWWISE_LOSSES(X)            \
  X(multilabel_categorical_crossentropy, 1) \
  X(multilabel_ranking_loss, 0)

// MLLOSS_ROW_SUMS(X) expands X(name, 0) for what has the arguments of such a loss, and a forward
// pass alone: the two sums of a row, for rows that come in parts.
#define MLLOSS_ROW_SUMS(X) X(row_sums, 0)
