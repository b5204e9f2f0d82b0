// Forward and backward pass of any loss that is a sum over elements. A loss is a header in math/;
// see math/sigmoid_cross_entropy.h for what it has to offer.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/tiles.h"
#include "cpu/work.h"
#include "math/reduction.h"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss::cpu {

// A tile with its constants per element; nullptr = all ones.
template <class Real>
struct PointwiseTile : Tile<Real> {
  const Real* weight = nullptr;
  const Real* pos_weight = nullptr;
};

// ---- Loops over a tile ----

// Adds kLanes elements to the lanes of a grouped sum: q <- q + e + q e collects the logarithms'
// argument. A tile gives each lane at most 32 elements, so q < 2^32.
template <TargetKind kKind, bool kMasked, class Loss, class Real>
MLLOSS_INLINE void add_to_groups(const Loss& loss, const Real* logits, const uint8_t* hard,
                                 const Real* soft, const uint8_t* observed, Real* q, Real* linear) {
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    Real x = logits[j];
    Real e, part;
    if constexpr (kKind == TargetKind::kSoft) {
      e = exp_nonpositive(-absolute(x));
      part = loss.linear_part(x, loss.smoothed(soft[j]));
    } else {
      // With the sign of positives flipped, every element is a negative.
      if constexpr (kKind == TargetKind::kHard) x = hard[j] != 0 ? -x : x;
      e = exp_nonpositive(-absolute(x));
      part = positive_part(x);
    }
    if constexpr (kMasked) {
      e = observed[j] != 0 ? e : Real(0);
      part = observed[j] != 0 ? part : Real(0);
    }
    q[j] = q[j] * e + (q[j] + e);
    linear[j] += part;
  }
}

// Sum of L over a tile without weights: one logarithm per lane instead of one per element.
template <TargetKind kKind, bool kMasked, class Loss, class Real>
MLLOSS_INLINE double grouped_sum(const Loss& loss, const PointwiseTile<Real>& tile) {
  alignas(64) Real q[kLanes] = {};
  alignas(64) Real linear[kLanes] = {};
  const LabelTile<Real>& labels = tile.labels;
  int i = 0;
  for (; i + kLanes <= tile.count; i += kLanes) {
    // Of the next tile; prefetching never faults.
    if constexpr (kKind == TargetKind::kHard) __builtin_prefetch(labels.hard + i + kTile);
    if constexpr (kMasked) __builtin_prefetch(labels.observed + i + kTile);
    add_to_groups<kKind, kMasked>(loss, tile.logits + i, labels.hard + i, labels.soft + i,
                                  labels.observed + i, q, linear);
  }
  if (i < tile.count) {
    // The rest, filled up with elements that are not observed.
    alignas(64) Real logits[kLanes], soft[kLanes];
    alignas(64) uint8_t hard[kLanes], observed[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      const bool inside = i + j < tile.count;
      logits[j] = inside ? tile.logits[i + j] : Real(0);
      if constexpr (kKind == TargetKind::kSoft) soft[j] = inside ? labels.soft[i + j] : Real(0);
      if constexpr (kKind == TargetKind::kHard) hard[j] = inside ? labels.hard[i + j] : 0;
      observed[j] = inside && (!kMasked || labels.observed[i + j] != 0);
    }
    add_to_groups<kKind, true>(loss, logits, hard, soft, observed, q, linear);
  }
  double sum = 0;
  Real parts[kLanes];
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) parts[j] = linear[j] + log1p_nonnegative(q[j]);
  for (int j = 0; j < kLanes; ++j) sum += parts[j];
  return sum;
}

// A tile as three numbers per element, whatever it was given as: what the loops with weights run
// on.
template <class Real>
struct Operands {
  // mask * weight: 0 where masked, NaN where the weight is negative.
  alignas(64) Real factor[kTile];
  alignas(64) Real target[kTile];
  alignas(64) Real pos_weight[kTile];

  MLLOSS_INLINE explicit Operands(const PointwiseTile<Real>& tile) {
    fill_factors(tile, factor);
    fill_targets(tile.labels, tile.count, target);
    for (int i = 0; i < tile.count; ++i) pos_weight[i] = 1;
    if (tile.pos_weight == nullptr) return;
#pragma omp simd
    for (int i = 0; i < tile.count; ++i) {
      pos_weight[i] = tile.pos_weight[i] < 0 ? kNaN<Real> : tile.pos_weight[i];
    }
  }

  MLLOSS_INLINE static void fill_factors(const PointwiseTile<Real>& tile, Real* factors) {
    for (int i = 0; i < tile.count; ++i) factors[i] = 1;
    if (tile.weight != nullptr) {
#pragma omp simd
      for (int i = 0; i < tile.count; ++i) {
        factors[i] = tile.weight[i] < 0 ? kNaN<Real> : tile.weight[i];
      }
    }
    if (tile.labels.observed != nullptr) {
#pragma omp simd
      for (int i = 0; i < tile.count; ++i) {
        factors[i] = tile.labels.observed[i] != 0 ? factors[i] : Real(0);
      }
    }
  }

  MLLOSS_INLINE static void fill_targets(const LabelTile<Real>& labels, int count, Real* targets) {
    if (labels.kind == TargetKind::kSoft) {
      for (int i = 0; i < count; ++i) targets[i] = labels.soft[i];
    } else if (labels.kind == TargetKind::kHard) {
#pragma omp simd
      for (int i = 0; i < count; ++i) targets[i] = labels.hard[i] != 0 ? Real(1) : Real(0);
    } else {
      for (int i = 0; i < count; ++i) targets[i] = 0;
    }
  }
};

// Weighted losses of a tile, one by one, written to `losses` [count].
template <class Loss, class Real>
MLLOSS_INLINE void weighted_losses(const Loss& loss, const PointwiseTile<Real>& tile,
                                   Real* losses) {
  const Operands<Real> operands(tile);
#pragma omp simd
  for (int i = 0; i < tile.count; ++i) {
    const Real factor = operands.factor[i];
    const Real y = loss.smoothed(operands.target[i]);
    const Real value = factor * loss.loss(tile.logits[i], y, operands.pos_weight[i]);
    losses[i] = factor == 0 ? Real(0) : value;
  }
}

// scale * factor * dL/dx of a tile, written to `gradients` [count].
template <class Loss, class Real>
MLLOSS_INLINE void weighted_gradients(const Loss& loss, const PointwiseTile<Real>& tile, Real scale,
                                      Real* gradients) {
  const Operands<Real> operands(tile);
#pragma omp simd
  for (int i = 0; i < tile.count; ++i) {
    const Real factor = operands.factor[i];
    const Real y = loss.smoothed(operands.target[i]);
    const Real value = scale * factor * loss.gradient(tile.logits[i], y, operands.pos_weight[i]);
    gradients[i] = factor == 0 ? Real(0) : value;
  }
}

// The same without weights and with hard targets: the sign of positives is flipped, and flipped
// back.
template <TargetKind kKind, bool kMasked, class Real>
MLLOSS_INLINE void hard_gradients(const PointwiseTile<Real>& tile, Real scale, Real* gradients) {
#pragma omp simd
  for (int i = 0; i < tile.count; ++i) {
    Real x = tile.logits[i];
    if constexpr (kKind == TargetKind::kHard) x = tile.labels.hard[i] != 0 ? -x : x;
    const Real e = exp_nonpositive(-absolute(x));
    Real gradient = scale * ((x < 0 ? e : Real(1)) / (Real(1) + e));
    if constexpr (kKind == TargetKind::kHard)
      gradient = tile.labels.hard[i] != 0 ? -gradient : gradient;
    if constexpr (kMasked) gradient = tile.labels.observed[i] != 0 ? gradient : Real(0);
    // exp_nonpositive(NaN) is NaN, and so is the gradient.
    gradients[i] = gradient;
  }
}

// ---- A tile, dispatched to a loop ----

// These two are wrapped in functions marked MLLOSS_CLONES by each loss.

// Sum of weight * L; also writes the terms if `losses` is given.
template <class Loss, class Real>
MLLOSS_INLINE double forward_tile(const Loss& loss, const PointwiseTile<Real>& tile, Real* losses) {
  if constexpr (requires { loss.linear_part(Real(), Real()); }) {
    if (losses == nullptr && tile.weight == nullptr && tile.pos_weight == nullptr) {
      const bool masked = tile.labels.observed != nullptr;
      if (tile.labels.kind == TargetKind::kSoft || !loss.keeps_hard_targets()) {
        return masked ? grouped_sum<TargetKind::kSoft, true>(loss, tile)
                      : grouped_sum<TargetKind::kSoft, false>(loss, tile);
      }
      if (tile.labels.kind == TargetKind::kHard) {
        return masked ? grouped_sum<TargetKind::kHard, true>(loss, tile)
                      : grouped_sum<TargetKind::kHard, false>(loss, tile);
      }
      return masked ? grouped_sum<TargetKind::kNone, true>(loss, tile)
                    : grouped_sum<TargetKind::kNone, false>(loss, tile);
    }
  }
  Real own[kTile];
  Real* out = losses == nullptr ? own : losses;
  weighted_losses(loss, tile, out);
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < tile.count; ++i) sum += static_cast<double>(out[i]);
  return sum;
}

template <class Loss, class Real>
MLLOSS_INLINE void backward_tile(const Loss& loss, const PointwiseTile<Real>& tile, Real scale,
                                 Real* gradients) {
  if constexpr (requires { loss.linear_part(Real(), Real()); }) {
    if (tile.weight == nullptr && tile.pos_weight == nullptr && loss.keeps_hard_targets()) {
      const bool masked = tile.labels.observed != nullptr;
      if (tile.labels.kind == TargetKind::kHard) {
        return masked ? hard_gradients<TargetKind::kHard, true>(tile, scale, gradients)
                      : hard_gradients<TargetKind::kHard, false>(tile, scale, gradients);
      }
      if (tile.labels.kind == TargetKind::kNone) {
        return masked ? hard_gradients<TargetKind::kNone, true>(tile, scale, gradients)
                      : hard_gradients<TargetKind::kNone, false>(tile, scale, gradients);
      }
    }
  }
  weighted_gradients(loss, tile, scale, gradients);
}

// ---- The whole matrix ----

// One thread's buffers for decoding tiles.
template <class Real>
class PointwiseReader {
 public:
  // `soften`: hard targets are wanted as numbers.
  PointwiseReader(const PointwiseProblem& problem, bool soften)
      : problem_(problem), soften_(soften), tiles_(problem, false) {}

  void start_row(int64_t row, int64_t begin, int64_t end) {
    row_ = row;
    tiles_.start_row(row, begin, end);
  }

  PointwiseTile<Real> tile(int64_t begin, int count) {
    PointwiseTile<Real> tile{tiles_.tile(begin, count)};
    if (soften_ && tile.labels.kind != TargetKind::kSoft) {
      Operands<Real>::fill_targets(tile.labels, count, soft_);
      tile.labels.kind = TargetKind::kSoft;
      tile.labels.soft = soft_;
    }
    tile.weight = constants(problem_.weight, begin, count, weight_);
    tile.pos_weight = constants(problem_.pos_weight, begin, count, pos_weight_);
    return tile;
  }

  // Numbers of any broadcast array, nullptr if it is all ones.
  const Real* constants(const Strided& array, int64_t begin, int count, Real* buffer) const {
    if (array.data == nullptr) return nullptr;
    const int64_t offset = row_ * array.row_stride + begin * array.column_stride;
    load(array.data, array.element, offset, array.column_stride, count, buffer);
    return buffer;
  }

 private:
  const PointwiseProblem& problem_;
  const bool soften_;
  int64_t row_ = 0;
  TileReader<Real> tiles_;
  alignas(64) Real soft_[kTile];
  alignas(64) Real weight_[kTile];
  alignas(64) Real pos_weight_[kTile];
};

struct PartialSum {
  double total = 0;        // sum of mask * weight * L
  double denominator = 0;  // what the reduction divides by, as far as it has to be counted
};

// The part of a tile in the denominator.
template <class Real>
double counted(const PointwiseTile<Real>& tile, Reduction reduction) {
  const uint8_t* observed = tile.labels.observed;
  if (reduction == Reduction::kMean || tile.weight == nullptr) {
    return observed == nullptr ? tile.count
                               : static_cast<double>(count_nonzero(observed, tile.count));
  }
  Real factors[kTile];
  Operands<Real>::fill_factors(tile, factors);
  double count = 0, sum = 0;
  for (int i = 0; i < tile.count; ++i) {
    count += factors[i] != 0;
    sum += factors[i];
  }
  return reduction == Reduction::kMeanNonzero ? count : sum;
}

// Divides: writes the 0-d loss and the factor of the gradient.
inline void finish_sum(const Problem& problem, PartialSum sum, const ForwardOutput& output) {
  const double denominator =
      denominator_of(problem.reduction, sum.denominator, problem.batch, problem.normalizer);
  *output.scale = scale_of(denominator);
  if (problem.reduction == Reduction::kNone) return;
  const double loss = denominator == 0 ? 0 : sum.total / denominator;
  if (problem.element == Element::kDouble) {
    *static_cast<double*>(output.loss) = loss;
  } else {
    *static_cast<float*>(output.loss) = static_cast<float>(loss);
  }
}

// `forward` wraps forward_tile: (loss, tile, losses or nullptr) -> sum.
template <class Loss, class Forward>
void pointwise_forward(PointwiseProblem problem, const Loss& loss, const ForwardOutput& output,
                       Forward forward) {
  using Real = typename Loss::Real;
  flatten(problem, nullptr);
  const Pieces pieces(problem.rows, problem.columns);
  Real* losses = problem.reduction == Reduction::kNone ? static_cast<Real*>(output.loss) : nullptr;
  const bool counts = problem.reduction == Reduction::kMean ||
                      problem.reduction == Reduction::kMeanNonzero ||
                      problem.reduction == Reduction::kWeightedMean;
  if (losses != nullptr) {
    prefer_huge_pages(losses, problem.rows * problem.columns * int64_t(sizeof(Real)));
  }
  std::vector<PartialSum> sums(pieces.count());
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    PointwiseReader<Real> reader(problem, !loss.keeps_hard_targets());
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      PartialSum sum;
      for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
        reader.start_row(row, piece.column_begin, piece.column_end);
        for (int64_t begin = piece.column_begin; begin < piece.column_end; begin += kTile) {
          const int count = static_cast<int>(std::min<int64_t>(kTile, piece.column_end - begin));
          const PointwiseTile<Real> tile = reader.tile(begin, count);
          Real* out = losses == nullptr ? nullptr : losses + row * problem.columns + begin;
          if (tile.labels.empty && out == nullptr) continue;
          sum.total += forward(loss, tile, out);
          if (counts) sum.denominator += counted(tile, problem.reduction);
        }
      }
      sums[index] = sum;
    }
  });
  PartialSum sum;
  for (const PartialSum& part : sums) {
    sum.total += part.total;
    sum.denominator += part.denominator;
  }
  finish_sum(problem, sum, output);
}

// `backward` wraps backward_tile: (loss, tile, scale, gradients).
template <class Loss, class Backward>
void pointwise_backward(PointwiseProblem problem, const Loss& loss, const BackwardInput& input,
                        const BackwardOutput& output, Backward backward) {
  using Real = typename Loss::Real;
  if (problem.rows == 0 || problem.columns == 0) return;  // grad_output may have no memory
  flatten(problem, &input.grad_output);
  const Pieces pieces(problem.rows, problem.columns);
  prefer_huge_pages(output.grad_input,
                    problem.rows * problem.columns * element_size(problem.element));
  const bool uniform = input.grad_output.row_stride == 0 && input.grad_output.column_stride == 0;
  double scale = *input.scale;
  if (uniform) {
    double upstream;
    load(input.grad_output.data, input.grad_output.element, 0, 0, 1, &upstream);
    scale *= upstream;
  }
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    PointwiseReader<Real> reader(problem, !loss.keeps_hard_targets());
    alignas(64) Real buffer[kTile];
    alignas(64) Real upstream[kTile];
    alignas(64) Real factors[kTile];
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
        reader.start_row(row, piece.column_begin, piece.column_end);
        for (int64_t begin = piece.column_begin; begin < piece.column_end; begin += kTile) {
          const int count = static_cast<int>(std::min<int64_t>(kTile, piece.column_end - begin));
          const PointwiseTile<Real> tile = reader.tile(begin, count);
          const int64_t offset = row * problem.columns + begin;
          Real* gradients = problem.element == kElementOf<Real>
                                ? static_cast<Real*>(output.grad_input) + offset
                                : buffer;
          backward(loss, tile, static_cast<Real>(scale), gradients);
          if (!uniform) {
            reader.constants(input.grad_output, begin, count, upstream);
            Operands<Real>::fill_factors(tile, factors);
            for (int i = 0; i < count; ++i) {
              // A masked element stays 0 even where what comes from above is not finite.
              gradients[i] = factors[i] == 0 ? Real(0) : gradients[i] * upstream[i];
            }
          }
          if (gradients == buffer) {
            store(buffer, count, output.grad_input, problem.element, offset);
          }
        }
      }
    }
  });
}

}  // namespace mlloss::cpu
