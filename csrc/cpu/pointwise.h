// Forward and backward pass of any loss that is a sum over elements. A loss is a header in math/;
// see math/sigmoid_cross_entropy.h for what it has to offer.
#pragma once
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/convert.h"
#include "cpu/entries.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/tiles.h"
#include "cpu/vector_kernels.h"
#include "cpu/work.h"
#include "math/reduction.h"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss::cpu {

// A tile with its constants per element. Targets are smoothed already.
template <class Real>
struct PointwiseTile : Tile<Real> {
  const Real* weight = nullptr;  // nullptr = all ones
  const Real* parameters[kMaxParameters] = {};
  bool has_parameters = false;  // false: the parameters are all ones
};

// ---- Loops over a tile ----

struct BitTable {
  uint32_t bit[kWordBits];
  constexpr BitTable() : bit() {
    for (int i = 0; i < kWordBits; ++i) bit[i] = 1u << i;
  }
  constexpr uint32_t operator[](int i) const { return bit[i]; }
};
alignas(64) constexpr BitTable kBits;

// Element j of hard labels that are given as bytes, or as the bits of one word.
MLLOSS_INLINE bool label_at(const uint8_t* bytes, int j) { return bytes[j] != 0; }
// A table rather than a shift by j: every instruction set can compare vectors.
MLLOSS_INLINE bool label_at(uint32_t bits, int j) { return (bits & kBits[j]) != 0; }

// For losses that are softplus(z): adds kCount elements to as many lanes of a grouped sum. q <- q +
// e
// + q e collects the logarithms' argument. A tile gives each lane at most 32 elements, so q < 2^32.
template <int kCount, TargetKind kKind, bool kMasked, class Loss, class Label, class Real>
MLLOSS_INLINE void add_to_lanes(const Real* logits, Label hard, const Real* soft, Label observed,
                                Real* q, Real* linear) {
#pragma omp simd
  for (int j = 0; j < kCount; ++j) {
    Real x = logits[j];
    Real e, part;
    if constexpr (kKind == TargetKind::kSoft) {
      e = exp_nonpositive(-absolute(x));
      part = Loss::linear_part(x, soft[j]);
    } else {
      // With the sign of positives flipped, every element is a negative.
      if constexpr (kKind == TargetKind::kHard) x = label_at(hard, j) ? -x : x;
      e = exp_nonpositive(-absolute(x));
      part = positive_part(x);
    }
    if constexpr (kMasked) {
      e = label_at(observed, j) ? e : Real(0);
      part = label_at(observed, j) ? part : Real(0);
    }
    q[j] = q[j] * e + (q[j] + e);
    linear[j] += part;
  }
}

template <TargetKind kKind, bool kMasked, class Loss, class Real>
MLLOSS_INLINE void add_to_groups(const Real* logits, const uint8_t* hard, const Real* soft,
                                 const uint8_t* observed, Real* q, Real* linear) {
  add_to_lanes<kLanes, kKind, kMasked, Loss>(logits, hard, soft, observed, q, linear);
}

// Word by word, so that the bits of each become the lanes of a vector.
template <TargetKind kKind, bool kMasked, class Loss, class Real>
MLLOSS_INLINE void add_to_groups(const Real* logits, const uint32_t* hard, const Real* soft,
                                 const uint32_t* observed, Real* q, Real* linear) {
  static_assert(kLanes == 2 * kWordBits);
  constexpr bool kHard = kKind == TargetKind::kHard;
  add_to_lanes<kWordBits, kKind, kMasked, Loss>(logits, kHard ? hard[0] : 0u, soft,
                                                kMasked ? observed[0] : 0u, q, linear);
  add_to_lanes<kWordBits, kKind, kMasked, Loss>(logits + kWordBits, kHard ? hard[1] : 0u, soft,
                                                kMasked ? observed[1] : 0u, q + kWordBits,
                                                linear + kWordBits);
}

// What label_at takes: the bytes themselves, or a word of bits.
MLLOSS_INLINE const uint8_t* labels_from(const uint8_t* bytes, int) { return bytes; }
MLLOSS_INLINE uint32_t labels_from(const uint32_t* bits, int word) { return bits[word]; }

// Labels of kLanes elements stand here from each other.
template <class Label>
constexpr int kLabelsPerGroup = sizeof(Label) == 1 ? kLanes : kLanes / kWordBits;

// Sum of L over a tile without weights: one logarithm per lane instead of one per element. `hard`
// and `observed` are bytes or bits.
template <TargetKind kKind, bool kMasked, class Loss, class Label, class Real>
MLLOSS_INLINE double grouped_sum(const PointwiseTile<Real>& tile, const Label* hard,
                                 const Label* observed) {
  constexpr int kStep = kLabelsPerGroup<Label>;
  constexpr bool kIsBits = sizeof(Label) > 1;
  alignas(64) Real q[kLanes] = {};
  alignas(64) Real linear[kLanes] = {};
  const Real* soft = tile.labels.soft;
  int i = 0;
  for (; i + kLanes <= tile.count; i += kLanes, hard += kStep, observed += kStep) {
    if constexpr (kIsBits && kMasked) {
      if ((observed[0] | observed[1]) == 0) continue;  // common where few labels are observed
    } else if constexpr (!kIsBits) {
      // Of the next tile; prefetching never faults.
      if constexpr (kKind == TargetKind::kHard) __builtin_prefetch(hard + kTile);
      if constexpr (kMasked) __builtin_prefetch(observed + kTile);
    }
    if constexpr (kIsBits && kKind == TargetKind::kHard) {
      if ((hard[0] | hard[1]) == 0) {  // as nearly everywhere among many labels
        add_to_groups<TargetKind::kNone, kMasked, Loss>(tile.logits + i, hard, soft, observed, q,
                                                        linear);
        continue;
      }
    }
    add_to_groups<kKind, kMasked, Loss>(tile.logits + i, hard, soft + i, observed, q, linear);
  }
  if (i < tile.count) {
    // The rest, filled up with elements that are not observed.
    alignas(64) Real last_logits[kLanes], last_soft[kLanes];
    alignas(64) uint8_t last_hard[kLanes], last_observed[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      const bool inside = i + j < tile.count;
      last_logits[j] = inside ? tile.logits[i + j] : Real(0);
      if constexpr (kKind == TargetKind::kSoft) last_soft[j] = inside ? soft[i + j] : Real(0);
      const int word = kIsBits ? j / kWordBits : 0, place = kIsBits ? j % kWordBits : j;
      if constexpr (kKind == TargetKind::kHard) {
        last_hard[j] = inside && label_at(labels_from(hard, word), place);
      }
      last_observed[j] = inside && (!kMasked || label_at(labels_from(observed, word), place));
    }
    add_to_groups<kKind, true, Loss>(last_logits, last_hard, last_soft, last_observed, q, linear);
  }
  double sum = 0;
  Real parts[kLanes];
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) parts[j] = linear[j] + log1p_nonnegative(q[j]);
  for (int j = 0; j < kLanes; ++j) sum += parts[j];
  return sum;
}

// mask * weight of a tile: 0 where masked.
template <class Real>
MLLOSS_INLINE void fill_factors(const PointwiseTile<Real>& tile, Real* factors) {
  const Real* weight = tile.weight;
  const uint8_t* observed = tile.labels.observed;
  for (int i = 0; i < tile.count; ++i) factors[i] = weight == nullptr ? Real(1) : weight[i];
  if (observed == nullptr) return;
#pragma omp simd
  for (int i = 0; i < tile.count; ++i) factors[i] = observed[i] != 0 ? factors[i] : Real(0);
}

// Hard targets as numbers as wide as the logits: a loop over bytes would take 64 elements at a
// time, which with this much arithmetic are more than there are registers for.
template <TargetKind kKind, class Real>
MLLOSS_INLINE void fill_positives(const PointwiseTile<Real>& tile, Real* positives) {
  if constexpr (kKind != TargetKind::kHard) return;
  const uint8_t* hard = tile.labels.hard;
#pragma omp simd
  for (int i = 0; i < tile.count; ++i) positives[i] = hard[i] != 0 ? Real(1) : Real(0);
}

template <class Loss, class Real>
MLLOSS_INLINE typename Loss::Parameters parameters_at(const PointwiseTile<Real>& tile, int i) {
  typename Loss::Parameters parameters;
  for (int k = 0; k < Loss::kParameters; ++k) parameters.value[k] = tile.parameters[k][i];
  return parameters;
}

// Weighted losses of a tile, one by one, written to `losses` [count].
template <TargetKind kKind, class Loss, class Real>
MLLOSS_INLINE void weighted_losses(const Loss& shared_loss, const PointwiseTile<Real>& tile,
                                   Real* losses) {
  alignas(64) Real factors[kTile];
  alignas(64) Real positives[kTile];
  fill_factors(tile, factors);
  fill_positives<kKind>(tile, positives);
  const Real* soft = tile.labels.soft;
  const Loss loss = shared_loss;  // of its own: a store to `losses` cannot change it
#pragma omp simd
  for (int i = 0; i < tile.count; ++i) {
    const auto parameters = parameters_at<Loss>(tile, i);
    Real value;
    if constexpr (kKind == TargetKind::kSoft) {
      value = loss.soft_loss(tile.logits[i], soft[i], parameters);
    } else {
      const bool positive = kKind == TargetKind::kHard && positives[i] != 0;
      value = loss.loss(tile.logits[i], positive, parameters);
    }
    losses[i] = factors[i] == 0 ? Real(0) : factors[i] * value;
  }
}

// scale * mask * weight * dL/dx of a tile, written to `gradients` [count].
template <TargetKind kKind, class Loss, class Real>
MLLOSS_INLINE void weighted_gradients(const Loss& shared_loss, const PointwiseTile<Real>& tile,
                                      Real scale, Real* gradients) {
  alignas(64) Real factors[kTile];
  alignas(64) Real positives[kTile];
  fill_factors(tile, factors);
  fill_positives<kKind>(tile, positives);
  const Real* soft = tile.labels.soft;
  const Loss loss = shared_loss;  // of its own: a store to `gradients` cannot change it
#pragma omp simd
  for (int i = 0; i < tile.count; ++i) {
    const auto parameters = parameters_at<Loss>(tile, i);
    Real value;
    if constexpr (kKind == TargetKind::kSoft) {
      value = loss.soft_gradient(tile.logits[i], soft[i], parameters);
    } else {
      const bool positive = kKind == TargetKind::kHard && positives[i] != 0;
      value = loss.gradient(tile.logits[i], positive, parameters);
    }
    gradients[i] = factors[i] == 0 ? Real(0) : scale * factors[i] * value;
  }
}

// The gradient of softplus(z) without weights: the sign of positives is flipped, and flipped back.
template <TargetKind kKind, bool kMasked, class Label, class Real>
MLLOSS_INLINE void softplus_gradients(const Real* logits, Label hard, Label observed, int count,
                                      Real scale, Real* gradients) {
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    Real x = logits[i];
    if constexpr (kKind == TargetKind::kHard) x = label_at(hard, i) ? -x : x;
    const Real e = exp_nonpositive(-absolute(x));
    Real gradient = scale * ((x < 0 ? e : Real(1)) / (Real(1) + e));
    if constexpr (kKind == TargetKind::kHard) gradient = label_at(hard, i) ? -gradient : gradient;
    if constexpr (kMasked) gradient = label_at(observed, i) ? gradient : Real(0);
    // exp_nonpositive(NaN) is NaN, and so is the gradient.
    gradients[i] = gradient;
  }
}

template <TargetKind kKind, bool kMasked, class Real>
MLLOSS_INLINE void tile_gradients(const PointwiseTile<Real>& tile, const uint8_t* hard,
                                  const uint8_t* observed, Real scale, Real* gradients) {
  softplus_gradients<kKind, kMasked>(tile.logits, hard, observed, tile.count, scale, gradients);
}

template <TargetKind kKind, bool kMasked, class Real>
MLLOSS_INLINE void tile_gradients(const PointwiseTile<Real>& tile, const uint32_t* hard,
                                  const uint32_t* observed, Real scale, Real* gradients) {
  for (int i = 0; i < tile.count; i += kWordBits) {
    const uint32_t positive = kKind == TargetKind::kHard ? hard[i / kWordBits] : 0u;
    const uint32_t used = kMasked ? observed[i / kWordBits] : 0u;
    if (kMasked && used == 0 && tile.count - i >= kWordBits) {
      for (int j = 0; j < kWordBits; ++j) gradients[i + j] = 0;
    } else if (kKind == TargetKind::kHard && positive == 0 && tile.count - i >= kWordBits) {
      softplus_gradients<TargetKind::kNone, kMasked>(tile.logits + i, positive, used, kWordBits,
                                                     scale, gradients + i);
    } else if (tile.count - i >= kWordBits) {
      softplus_gradients<kKind, kMasked>(tile.logits + i, positive, used, kWordBits, scale,
                                         gradients + i);
    } else {
      softplus_gradients<kKind, kMasked>(tile.logits + i, positive, used, tile.count - i, scale,
                                         gradients + i);
    }
  }
}

// ---- A tile, dispatched to a loop ----

// Calls run(kind) with the kind of a tile's targets as a type.
template <TargetKind kKind>
struct KindConstant {
  static constexpr TargetKind value = kKind;
};

template <class Run>
MLLOSS_INLINE auto dispatch_kind(TargetKind kind, const Run& run) {
  if (kind == TargetKind::kSoft) return run(KindConstant<TargetKind::kSoft>{});
  if (kind == TargetKind::kHard) return run(KindConstant<TargetKind::kHard>{});
  return run(KindConstant<TargetKind::kNone>{});
}

// Calls run(loss) with the cheapest form of a loss, if it has several.
template <class Loss, class Run>
MLLOSS_INLINE void specialize(const Loss& loss, const Run& run) {
  if constexpr (requires { &Loss::template specialize<Run>; }) {
    loss.specialize(run);
  } else {
    run(loss);
  }
}

// The same with hard targets and mask as they are given, as bytes or bits: run(kind, hard,
// observed).
template <class Real, class Run>
MLLOSS_INLINE auto dispatch_carrier(const LabelTile<Real>& labels, const Run& run) {
  return dispatch_kind(labels.kind, [&](auto kind) MLLOSS_INLINE_LAMBDA {
    if constexpr (decltype(kind)::value != TargetKind::kSoft) {
      if (labels.hard_bits != nullptr || labels.observed_bits != nullptr) {
        return run(kind, labels.hard_bits, labels.observed_bits);
      }
    }
    return run(kind, labels.hard, labels.observed);
  });
}

// Sum of weight * L; also writes the terms if `losses` is given.
template <class Loss, class Real>
MLLOSS_INLINE double forward_tile(const Loss& loss, const PointwiseTile<Real>& tile, Real* losses) {
  if constexpr (Loss::kIsSoftplus) {
    if (losses == nullptr && tile.weight == nullptr && !tile.has_parameters) {
      return dispatch_carrier(
          tile.labels, [&](auto kind, const auto* hard, const auto* observed) MLLOSS_INLINE_LAMBDA {
            constexpr TargetKind kKind = decltype(kind)::value;
            return observed != nullptr ? grouped_sum<kKind, true, Loss>(tile, hard, observed)
                                       : grouped_sum<kKind, false, Loss>(tile, hard, observed);
          });
    }
  }
  alignas(64) Real own[kTile];
  Real* out = losses == nullptr ? own : losses;
  dispatch_kind(tile.labels.kind, [&](auto kind) MLLOSS_INLINE_LAMBDA {
    specialize(loss, [&](const auto& own) MLLOSS_INLINE_LAMBDA {
      weighted_losses<decltype(kind)::value>(own, tile, out);
    });
  });
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < tile.count; ++i) sum += static_cast<double>(out[i]);
  return sum;
}

template <class Loss, class Real>
MLLOSS_INLINE void backward_tile(const Loss& loss, const PointwiseTile<Real>& tile, Real scale,
                                 Real* gradients) {
  dispatch_carrier(
      tile.labels, [&](auto kind, const auto* hard, const auto* observed) MLLOSS_INLINE_LAMBDA {
        constexpr TargetKind kKind = decltype(kind)::value;
        if constexpr (Loss::kIsSoftplus && kKind != TargetKind::kSoft) {
          if (tile.weight == nullptr && !tile.has_parameters) {
            return observed != nullptr
                       ? tile_gradients<kKind, true>(tile, hard, observed, scale, gradients)
                       : tile_gradients<kKind, false>(tile, hard, observed, scale, gradients);
          }
        }
        specialize(loss, [&](const auto& own) MLLOSS_INLINE_LAMBDA {
          weighted_gradients<kKind>(own, tile, scale, gradients);
        });
      });
}

// Whether the loss of every element is softplus(z) and counts once.
template <class Loss>
bool is_plain_softplus(const PointwiseProblem& problem) {
  return Loss::kIsSoftplus && problem.weight.data == nullptr && !problem.has_parameters();
}

// Whether the loops need nothing but logits and labels.
template <class Loss>
bool needs_labels_only(const PointwiseProblem& problem) {
  return is_plain_softplus<Loss>(problem) && problem.label_smoothing == 0;
}

// Whether the loops that know bits will run.
template <class Loss>
Carrier carrier_for(const PointwiseProblem& problem) {
  return needs_labels_only<Loss>(problem) && has_bits(problem) ? Carrier::kBits : Carrier::kBytes;
}

// The vectorised loops that a loss has: those of softplus, unless it has its own. They take a tile
// as it is stored, or return false.
template <class Loss>
struct VectorLoss {
  static constexpr bool kExists = Loss::kIsSoftplus;

  // Adds to `sum`.
  static bool sum(const VectorKernels& vector, const Loss&, const PointwiseTile<float>& tile,
                  LossSum* sum) {
    if (is_plain(tile)) {
      vector.softplus_sum(tile, sum);
    } else if (tile.labels.kind != TargetKind::kSoft) {
      vector.weighted_softplus_sum(tile, factors_of(tile), sum);
    } else {
      return false;
    }
    return true;
  }

  static bool gradients(const VectorKernels& vector, const Loss&, const PointwiseTile<float>& tile,
                        float scale, bool stream, void* gradients) {
    if (is_plain(tile)) {
      vector.softplus_gradients(tile, scale, stream, gradients);
    } else if (tile.labels.kind != TargetKind::kSoft) {
      vector.weighted_softplus_gradients(tile, factors_of(tile), scale, stream, gradients);
    } else {
      return false;
    }
    return true;
  }

 private:
  static bool is_plain(const PointwiseTile<float>& tile) {
    return tile.weight == nullptr && !tile.has_parameters;
  }
  static Factors factors_of(const PointwiseTile<float>& tile) {
    return {tile.weight, tile.has_parameters ? tile.parameters[0] : nullptr};
  }
};

// The vectorised loops for a problem, or nullptr.
template <class Loss>
const VectorKernels* vector_kernels_for(const PointwiseProblem& problem) {
  const bool takes = VectorLoss<Loss>::kExists && problem.element != Element::kDouble;
  return takes ? vector_kernels() : nullptr;
}

// How these take logits, unless more than a pass goes over a tile in the L1 cache.
template <class Loss>
Logits logits_for(const PointwiseProblem& problem, const VectorKernels* vector) {
  if (vector == nullptr) return Logits::kDecoded;
  return needs_labels_only<Loss>(problem) ? Logits::kWide : Logits::kStored;
}

// ---- The whole matrix ----

// Rows that are read as one tile: short ones that lie one behind the other.
inline int rows_in_tile(const PointwiseProblem& problem) {
  return problem.row_stride == problem.columns ? rows_at_once(problem) : 1;
}

// One thread's buffers for what stands beside logits and labels.
template <class Real>
class PointwiseConstants {
 public:
  explicit PointwiseConstants(const PointwiseProblem& problem)
      : problem_(problem),
        has_parameters_(problem.has_parameters()),
        low_(static_cast<Real>(problem.label_smoothing / 2)),
        span_(static_cast<Real>(1 - problem.label_smoothing)) {
    std::fill_n(ones_, kTile, Real(1));
    const int rows = rows_in_tile(problem);
    if (rows == 1 || goes_by_entries(problem)) return;
    // What is the same in all rows is read once for all tiles of several rows.
    const auto load_all = [&](const Strided& array, Real* out) {
      load_columns(array, 0, 0, rows * static_cast<int>(problem.columns), out);
    };
    const auto prepare = [&](const Strided& array, Real* buffer) {
      if (array.data == nullptr || array.row_stride != 0) return false;
      checked(array, rows * static_cast<int>(problem.columns), buffer, load_all);
      return true;
    };
    has_weight_ = prepare(problem.weight, weight_);
    for (int k = 0; k < kMaxParameters; ++k) {
      has_parameter_[k] = prepare(problem.parameters[k], parameters_[k]);
    }
  }

  // Completes a tile by the constants of the columns that `load` reads: (array, buffer).
  template <class Load>
  void attach_by(const Load& load, PointwiseTile<Real>& tile) {
    smooth(tile.labels, tile.count);
    tile.has_parameters = has_parameters_;
    tile.weight = problem_.weight.data == nullptr ? nullptr
                  : has_weight_ ? weight_
                                : checked(problem_.weight, tile.count, weight_, load);
    for (int k = 0; k < kMaxParameters; ++k) {
      const Strided& parameter = problem_.parameters[k];
      tile.parameters[k] = parameter.data == nullptr ? ones_
                           : has_parameter_[k]
                               ? parameters_[k]
                               : checked(parameter, tile.count, parameters_[k], load);
    }
  }

  void attach(int64_t row, int64_t begin, PointwiseTile<Real>& tile) {
    const auto load_own = [&](const Strided& array, Real* out) {
      load_columns(array, row, begin, tile.count, out);
    };
    attach_by(load_own, tile);
  }

  void attach(int64_t row, const int64_t* columns, PointwiseTile<Real>& tile) {
    const auto gather_own = [&](const Strided& array, Real* out) {
      gather(array.data, array.element, row * array.row_stride, array.column_stride, columns,
             tile.count, out);
    };
    attach_by(gather_own, tile);
  }

  // Of one row, or all columns of several rows.
  void load_columns(const Strided& array, int64_t row, int64_t begin, int count, Real* out) const {
    const int64_t offset = row * array.row_stride + begin * array.column_stride;
    if (count <= problem_.columns) {
      load(array.data, array.element, offset, array.column_stride, count, out);
      return;
    }
    const int columns = static_cast<int>(problem_.columns);
    load_rows(array.data, array.element, offset, array.row_stride, array.column_stride,
              count / columns, columns, out);
  }

 private:
  void smooth(LabelTile<Real>& labels, int count) {
    if (span_ == Real(1)) return;
    for (int i = 0; i < count; ++i) {
      const Real y = labels.kind == TargetKind::kSoft                          ? labels.soft[i]
                     : labels.kind == TargetKind::kHard && labels.hard[i] != 0 ? Real(1)
                                                                               : Real(0);
      soft_[i] = low_ + y * span_;
    }
    labels.kind = TargetKind::kSoft;
    labels.soft = soft_;
  }

  // Negative constants are not a number; nor is what was none before, but with other bits, see
  // quiet_scale in vector_loops.h.
  template <class Load>
  const Real* checked(const Strided& array, int count, Real* buffer, const Load& load) const {
    load(array, buffer);
#pragma omp simd
    for (int i = 0; i < count; ++i) buffer[i] = buffer[i] >= 0 ? buffer[i] : kNaN<Real>;
    return buffer;
  }

  const PointwiseProblem& problem_;
  const bool has_parameters_;
  const Real low_, span_;
  // Whether these have been read already.
  bool has_weight_ = false;
  bool has_parameter_[kMaxParameters] = {};
  alignas(64) Real ones_[kTile];
  alignas(64) Real soft_[kTile];
  alignas(64) Real weight_[kTile + kPadding];
  alignas(64) Real parameters_[kMaxParameters][kTile + kPadding];
};

struct PartialSum {
  double total = 0;        // sum of mask * weight * L
  double denominator = 0;  // what the reduction divides by, as far as it has to be counted
};

inline bool counts(Reduction reduction) {
  return reduction == Reduction::kMean || reduction == Reduction::kMeanNonzero ||
         reduction == Reduction::kWeightedMean;
}

// The part of a tile in the denominator.
template <class Real>
double counted(const PointwiseTile<Real>& tile, Reduction reduction,
               [[maybe_unused]] const VectorKernels* vector = nullptr) {
  const uint8_t* observed = tile.labels.observed;
  const uint32_t* observed_bits = tile.labels.observed_bits;
  const bool is_masked = observed != nullptr || observed_bits != nullptr;
  if constexpr (std::is_same_v<Real, float>) {
    if (vector != nullptr && is_masked &&
        (reduction == Reduction::kMean || tile.weight == nullptr)) {
      return static_cast<double>(vector->count_observed(tile));
    }
  }
  if (observed_bits != nullptr) return count_bits(observed_bits, tile.count);
  if (reduction == Reduction::kMean || tile.weight == nullptr) {
    return observed == nullptr ? tile.count
                               : static_cast<double>(count_nonzero(observed, tile.count));
  }
  Real factors[kTile];
  fill_factors(tile, factors);
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

// Calls body(tile, begin) for the tiles of a piece's rows, from left to right.
template <class TileType, class Real, class Body>
void for_tiles(const Piece& piece, int64_t row, TileReader<Real>& reader, const Body& body) {
  TileType tile;
  reader.start_row(row, piece.column_begin, piece.column_end);
  const int width = reader.width();
  for (int64_t begin = piece.column_begin; begin < piece.column_end; begin += width) {
    const int count = static_cast<int>(std::min<int64_t>(width, piece.column_end - begin));
    reader.read(begin, count, tile);
    body(tile, begin);
  }
}

// Adds up in the order of the pieces.
inline PartialSum total_of(const std::vector<PartialSum>& parts) {
  PartialSum sum;
  for (const PartialSum& part : parts) {
    sum.total += part.total;
    sum.denominator += part.denominator;
  }
  return sum;
}

// Calls body(tile, row, begin) for the tiles of a piece. Of short rows a tile holds several, the
// first of which is `row`.
template <class Real, class Body>
void for_all_tiles(const PointwiseProblem& problem, const Piece& piece, TileReader<Real>& reader,
                   const Body& body) {
  const int64_t step = rows_in_tile(problem);
  for (int64_t row = piece.row_begin; row < piece.row_end; row += step) {
    const int64_t end = std::min(row + step, piece.row_end);
    const int rows = static_cast<int>(end - row);
    if (step > 1 && reader.start_rows(row, rows)) {
      PointwiseTile<Real> tile;
      reader.read(0, rows * static_cast<int>(problem.columns), tile);
      body(tile, row, int64_t(0));
      continue;
    }
    for (int64_t own = row; own < end; ++own) {
      for_tiles<PointwiseTile<Real>>(
          piece, own, reader,
          [&](PointwiseTile<Real>& tile, int64_t begin) { body(tile, own, begin); });
    }
  }
}

// Pieces of whole tiles.
inline Pieces pieces_of_tiles(const PointwiseProblem& problem) {
  return Pieces(problem.rows, problem.columns).of_groups(rows_in_tile(problem));
}

// `forward` wraps forward_tile: (loss, tile, losses or nullptr) -> sum.
template <class Loss, class Forward>
PartialSum forward_over_tiles(const PointwiseProblem& problem, typename Loss::Real* losses,
                              const Forward& forward) {
  using Real = typename Loss::Real;
  const Loss loss = Loss::from(problem);
  const Pieces pieces = pieces_of_tiles(problem);
  const Carrier carrier = losses == nullptr ? carrier_for<Loss>(problem) : Carrier::kBytes;
  const VectorKernels* vector = losses == nullptr ? vector_kernels_for<Loss>(problem) : nullptr;
  const Logits logits = logits_for<Loss>(problem, vector);
  std::vector<PartialSum> sums(pieces.count());
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    TileReader<Real> reader(problem, false, carrier, logits);
    PointwiseConstants<Real> constants(problem);
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      PartialSum sum;
      LossSum vector_sum;
      const auto add = [&](PointwiseTile<Real>& tile, int64_t row, int64_t begin) {
        Real* out = losses == nullptr ? nullptr : losses + row * problem.columns + begin;
        if (tile.labels.empty && out == nullptr) return;
        constants.attach(row, begin, tile);
        bool done = false;
        if constexpr (std::is_same_v<Real, float>) {
          if (vector != nullptr) {
            done = VectorLoss<Loss>::sum(*vector, loss, tile, &vector_sum);
            if (!done) reader.decode(tile);
          }
        }
        if (!done) sum.total += forward(loss, tile, out);
        if (counts(problem.reduction)) sum.denominator += counted(tile, problem.reduction, vector);
      };
      for_all_tiles(problem, piece, reader, add);
      if (vector != nullptr) sum.total += vector->total(&vector_sum);
      sums[index] = sum;
    }
  });
  return total_of(sums);
}

// The same where only the listed labels are observed: the time is that of the entries.
template <class Loss, class Forward>
PartialSum forward_over_entries(const PointwiseProblem& problem, typename Loss::Real* losses,
                                const Forward& forward) {
  using Real = typename Loss::Real;
  const Loss loss = Loss::from(problem);
  const Pieces pieces = pieces_of_entries(problem, losses != nullptr);
  std::vector<PartialSum> sums(pieces.count());
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    EntryReader<Real> reader(problem);
    PointwiseTile<Real> tile;
    PointwiseConstants<Real> constants(problem);
    alignas(64) Real buffer[kTile];
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      PartialSum sum;
      for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
        reader.start_row(row);
        Real* out = losses == nullptr ? nullptr : losses + row * problem.columns;
        if (out != nullptr) std::fill_n(out, problem.columns, Real(0));
        while (reader.read(tile)) {
          constants.attach(row, reader.columns(), tile);
          sum.total += forward(loss, tile, out == nullptr ? nullptr : buffer);
          if (counts(problem.reduction)) sum.denominator += counted(tile, problem.reduction);
          if (out != nullptr) {
            scatter(buffer, reader.columns(), tile.count, out, kElementOf<Real>, 0);
          }
        }
      }
      sums[index] = sum;
    }
  });
  return total_of(sums);
}

// Whether every element counts, so that there is nothing to look at for a denominator.
inline bool counts_everything(const PointwiseProblem& problem) {
  return problem.mask.data == nullptr && !problem.has_ignored &&
         problem.target.format != Format::kObserved &&
         (problem.weight.data == nullptr || problem.reduction == Reduction::kMean);
}

// The denominator before the pass that needs it: from labels and weights alone, with the sums of
// the forward pass.
template <class Loss>
double count_beforehand(PointwiseProblem problem) {
  using Real = typename Loss::Real;
  if (!counts(problem.reduction)) return 0;
  if (counts_everything(problem)) return static_cast<double>(problem.rows * problem.columns);
  for (Strided& parameter : problem.parameters) parameter = {};
  problem.label_smoothing = 0;
  const bool by_entries = goes_by_entries(problem);
  const Pieces pieces = by_entries ? pieces_of_entries(problem, true) : pieces_of_tiles(problem);
  const Carrier carrier = carrier_for<Loss>(problem);
  std::vector<PartialSum> sums(pieces.count());
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    // Which leaves the logits alone.
    TileReader<Real> reader(problem, false, carrier, Logits::kStored);
    EntryReader<Real> entries(problem);
    PointwiseTile<Real> tile;
    PointwiseConstants<Real> constants(problem);
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      const auto add = [&](const PointwiseTile<Real>& tile) {
        sums[index].denominator += counted(tile, problem.reduction);
      };
      if (!by_entries) {
        for_all_tiles(problem, piece, reader,
                      [&](PointwiseTile<Real>& tile, int64_t row, int64_t begin) {
                        if (tile.labels.empty) return;
                        constants.attach(row, begin, tile);
                        add(tile);
                      });
        continue;
      }
      for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
        entries.start_row(row);
        while (entries.read(tile)) {
          constants.attach(row, entries.columns(), tile);
          add(tile);
        }
      }
    }
  });
  return total_of(sums).denominator;
}

// Loss and gradient in one pass: of each tile first the one, then the other, while it is in the
// cache. `scale` is the factor of the gradient; `output` may be the logits.
template <class Loss, class Forward, class Backward>
PartialSum one_pass_over_tiles(const PointwiseProblem& problem, typename Loss::Real scale,
                               void* output, const Forward& forward, const Backward& backward) {
  using Real = typename Loss::Real;
  const Loss loss = Loss::from(problem);
  const Pieces pieces = pieces_of_tiles(problem);
  const Carrier carrier = carrier_for<Loss>(problem);
  const VectorKernels* vector = vector_kernels_for<Loss>(problem);
  std::vector<PartialSum> sums(pieces.count());
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    TileReader<Real> reader(problem, false, carrier,
                            vector != nullptr ? Logits::kStored : Logits::kDecoded);
    PointwiseConstants<Real> constants(problem);
    alignas(64) Real buffer[kTile];
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      PartialSum sum;
      LossSum vector_sum;
      const auto add = [&](PointwiseTile<Real>& tile, int64_t row, int64_t begin) {
        const int64_t offset = row * problem.row_stride + begin;
        const int count = tile.count;
        if (tile.labels.empty) return zero_run(output, problem.element, offset, count);
        Real* gradients =
            problem.element == kElementOf<Real> ? static_cast<Real*>(output) + offset : buffer;
        constants.attach(row, begin, tile);
        if constexpr (std::is_same_v<Real, float>) {
          if (vector != nullptr) {
            void* out = element_at(output, problem.element, offset);
            if (VectorLoss<Loss>::sum(*vector, loss, tile, &vector_sum)) {
              VectorLoss<Loss>::gradients(*vector, loss, tile, scale, false, out);
              return;
            }
            reader.decode(tile);
          }
        }
        sum.total += forward(loss, tile, static_cast<Real*>(nullptr));
        backward(loss, tile, scale, gradients);
        if (gradients == buffer) store(buffer, count, output, problem.element, offset);
      };
      for_all_tiles(problem, piece, reader, add);
      if (vector != nullptr) sum.total += vector->total(&vector_sum);
      sums[index] = sum;
    }
  });
  return total_of(sums);
}

// Gradients of a row's entries, kept until all its logits have been read.
template <class Real>
class RowOfEntries {
 public:
  void clear() {
    columns_.clear();
    values_.clear();
  }

  // Room for the values of `count` more columns.
  Real* add(const int64_t* columns, int count) {
    columns_.insert(columns_.end(), columns, columns + count);
    values_.resize(columns_.size());
    return values_.data() + values_.size() - count;
  }

  // Writes the row, 0 where there is no entry; `offset` is where it begins.
  void write(const Problem& problem, void* output, int64_t offset) const {
    zero_run(output, problem.element, offset, problem.columns);
    for (size_t i = 0; i < values_.size(); i += kTile) {
      const int count = static_cast<int>(std::min<size_t>(kTile, values_.size() - i));
      scatter(values_.data() + i, columns_.data() + i, count, output, problem.element, offset);
    }
  }

 private:
  std::vector<int64_t> columns_;
  std::vector<Real> values_;
};

// The same where only the listed labels are observed.
template <class Loss, class Forward, class Backward>
PartialSum one_pass_over_entries(const PointwiseProblem& problem, typename Loss::Real scale,
                                 void* output, const Forward& forward, const Backward& backward) {
  using Real = typename Loss::Real;
  const Loss loss = Loss::from(problem);
  const Pieces pieces = pieces_of_entries(problem, true);
  std::vector<PartialSum> sums(pieces.count());
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    EntryReader<Real> reader(problem);
    PointwiseTile<Real> tile;
    PointwiseConstants<Real> constants(problem);
    RowOfEntries<Real> gradients;
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      PartialSum sum;
      for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
        reader.start_row(row);
        gradients.clear();
        while (reader.read(tile)) {
          constants.attach(row, reader.columns(), tile);
          sum.total += forward(loss, tile, static_cast<Real*>(nullptr));
          backward(loss, tile, scale, gradients.add(reader.columns(), tile.count));
        }
        gradients.write(problem, output, row * problem.row_stride);
      }
      sums[index] = sum;
    }
  });
  return total_of(sums);
}

// `scale`, as the gradient of the reduced loss needs it.
inline double scaled_for_gradient(double scale, const ForwardOutput& output) {
  return output.gradient_scale == nullptr ? scale : scale * *output.gradient_scale;
}

template <class Loss, class Forward, class Backward>
void pointwise_one_pass(const PointwiseProblem& problem, const ForwardOutput& output,
                        const Forward& forward, const Backward& backward) {
  using Real = typename Loss::Real;
  const double count = count_beforehand<Loss>(problem);
  const double denominator =
      denominator_of(problem.reduction, count, problem.batch, problem.normalizer);
  const Real scale = static_cast<Real>(scaled_for_gradient(scale_of(denominator), output));
  PartialSum sum =
      goes_by_entries(problem)
          ? one_pass_over_entries<Loss>(problem, scale, output.gradient, forward, backward)
          : one_pass_over_tiles<Loss>(problem, scale, output.gradient, forward, backward);
  sum.denominator = count;
  finish_sum(problem, sum, output);
}

template <class Loss, class Forward, class Backward>
void pointwise_forward(PointwiseProblem problem, const ForwardOutput& output,
                       const Forward& forward, const Backward& backward) {
  using Real = typename Loss::Real;
  flatten(problem, nullptr);
  if (output.gradient != nullptr) {
    return pointwise_one_pass<Loss>(problem, output, forward, backward);
  }
  Real* losses = problem.reduction == Reduction::kNone ? static_cast<Real*>(output.loss) : nullptr;
  if (losses != nullptr) {
    prefer_huge_pages(losses, problem.rows * problem.columns * int64_t(sizeof(Real)));
  }
  const PartialSum sum = goes_by_entries(problem)
                             ? forward_over_entries<Loss>(problem, losses, forward)
                             : forward_over_tiles<Loss>(problem, losses, forward);
  finish_sum(problem, sum, output);
}

// `grad_output` as it is multiplied to the gradients of a tile.
template <class Real>
class Upstream {
 public:
  explicit Upstream(const BackwardInput& input)
      : array_(input.grad_output),
        uniform_(array_.row_stride == 0 && array_.column_stride == 0),
        scale_(*input.scale) {
    if (!uniform_) return;
    double upstream;
    load(array_.data, array_.element, 0, 0, 1, &upstream);
    scale_ *= upstream;
  }

  bool is_uniform() const { return uniform_; }

  // What every gradient is multiplied by.
  Real scale() const { return static_cast<Real>(scale_); }

  // Multiplies what differs between elements. `load` reads an array at the tile's columns.
  template <class Load>
  void apply(const PointwiseTile<Real>& tile, const Load& load, Real* gradients) const {
    if (uniform_) return;
    alignas(64) Real upstream[kTile + kPadding];
    alignas(64) Real factors[kTile];
    load(array_, upstream);
    fill_factors(tile, factors);
    for (int i = 0; i < tile.count; ++i) {
      // A masked element stays 0 even where what comes from above is not finite.
      gradients[i] = factors[i] == 0 ? Real(0) : gradients[i] * upstream[i];
    }
  }

 private:
  const Strided& array_;
  const bool uniform_;
  double scale_;
};

// `backward` wraps backward_tile: (loss, tile, scale, gradients).
template <class Loss, class Backward>
void backward_over_tiles(const PointwiseProblem& problem,
                         const Upstream<typename Loss::Real>& upstream, void* grad_input,
                         const Backward& backward) {
  using Real = typename Loss::Real;
  const Loss loss = Loss::from(problem);
  const Pieces pieces = pieces_of_tiles(problem);
  const Carrier carrier = upstream.is_uniform() ? carrier_for<Loss>(problem) : Carrier::kBytes;
  const VectorKernels* vector = upstream.is_uniform() ? vector_kernels_for<Loss>(problem) : nullptr;
  const Logits logits = logits_for<Loss>(problem, vector);
  const bool stream = is_streamed(problem);
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    TileReader<Real> reader(problem, false, carrier, logits);
    PointwiseConstants<Real> constants(problem);
    alignas(64) Real buffer[kTile];
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      const auto write = [&](PointwiseTile<Real>& tile, int64_t row, int64_t begin) {
        const int64_t offset = row * problem.columns + begin;
        Real* gradients =
            problem.element == kElementOf<Real> ? static_cast<Real*>(grad_input) + offset : buffer;
        const int count = tile.count;
        constants.attach(row, begin, tile);
        if constexpr (std::is_same_v<Real, float>) {
          if (vector != nullptr) {
            void* out = element_at(grad_input, problem.element, offset);
            const float scale = upstream.scale();
            if (VectorLoss<Loss>::gradients(*vector, loss, tile, scale, stream, out)) return;
            reader.decode(tile);
          }
        }
        backward(loss, tile, upstream.scale(), gradients);
        const auto load_own = [&](const Strided& array, Real* out) {
          constants.load_columns(array, row, begin, count, out);
        };
        upstream.apply(tile, load_own, gradients);
        if (gradients == buffer) store(buffer, count, grad_input, problem.element, offset);
      };
      for_all_tiles(problem, piece, reader, write);
    }
    if (vector != nullptr && stream) vector->fence();
  });
}

// The same where only the listed labels are observed: apart from the zeros, the time is that of the
// entries.
template <class Loss, class Backward>
void backward_over_entries(const PointwiseProblem& problem,
                           const Upstream<typename Loss::Real>& upstream, void* grad_input,
                           const Backward& backward) {
  using Real = typename Loss::Real;
  const Loss loss = Loss::from(problem);
  const Pieces pieces = pieces_of_entries(problem, true);
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    EntryReader<Real> reader(problem);
    PointwiseTile<Real> tile;
    PointwiseConstants<Real> constants(problem);
    alignas(64) Real gradients[kTile];
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
        reader.start_row(row);
        zero_row(problem, row, grad_input);
        while (reader.read(tile)) {
          const int64_t* columns = reader.columns();
          constants.attach(row, columns, tile);
          backward(loss, tile, upstream.scale(), gradients);
          const auto load_own = [&](const Strided& array, Real* out) {
            gather(array.data, array.element, row * array.row_stride, array.column_stride, columns,
                   tile.count, out);
          };
          upstream.apply(tile, load_own, gradients);
          scatter(gradients, columns, tile.count, grad_input, problem.element,
                  row * problem.columns);
        }
      }
    }
  });
}

template <class Loss, class Backward>
void pointwise_backward(PointwiseProblem problem, const BackwardInput& input,
                        const BackwardOutput& output, const Backward& backward) {
  if (problem.rows == 0 || problem.columns == 0) return;  // grad_output may have no memory
  flatten(problem, &input.grad_output);
  prefer_huge_pages(output.grad_input,
                    problem.rows * problem.columns * element_size(problem.element));
  const Upstream<typename Loss::Real> upstream(input);
  if (goes_by_entries(problem)) {
    backward_over_entries<Loss>(problem, upstream, output.grad_input, backward);
  } else {
    backward_over_tiles<Loss>(problem, upstream, output.grad_input, backward);
  }
}

}  // namespace mlloss::cpu

// Defines the kernels of a loss, declared in kernels.h, from its formula, a header in math/: the
// loops of this file compiled for each instruction set.
#define MLLOSS_POINTWISE_KERNELS(name, Loss)                                                       \
  namespace mlloss::cpu {                                                                          \
  namespace name {                                                                                 \
  template <class Real>                                                                            \
  using Formula = Loss<Real>;                                                                      \
  MLLOSS_CLONES double forward_loop(const Formula<float>& loss, const PointwiseTile<float>& tile,  \
                                    float* losses) {                                               \
    return forward_tile(loss, tile, losses);                                                       \
  }                                                                                                \
  MLLOSS_CLONES double forward_loop(const Formula<double>& loss,                                   \
                                    const PointwiseTile<double>& tile, double* losses) {           \
    return forward_tile(loss, tile, losses);                                                       \
  }                                                                                                \
  MLLOSS_CLONES void backward_loop(const Formula<float>& loss, const PointwiseTile<float>& tile,   \
                                   float scale, float* gradients) {                                \
    backward_tile(loss, tile, scale, gradients);                                                   \
  }                                                                                                \
  MLLOSS_CLONES void backward_loop(const Formula<double>& loss, const PointwiseTile<double>& tile, \
                                   double scale, double* gradients) {                              \
    backward_tile(loss, tile, scale, gradients);                                                   \
  }                                                                                                \
                                                                                                   \
  void forward(const PointwiseProblem& problem, const ForwardOutput& output) {                     \
    const auto loop = [](const auto& loss, const auto& tile, auto* losses) {                       \
      return forward_loop(loss, tile, losses);                                                     \
    };                                                                                             \
    const auto gradient_loop = [](const auto& loss, const auto& tile, auto scale,                  \
                                  auto* gradients) {                                               \
      backward_loop(loss, tile, scale, gradients);                                                 \
    };                                                                                             \
    if (problem.element == Element::kDouble) {                                                     \
      pointwise_forward<Formula<double>>(problem, output, loop, gradient_loop);                    \
    } else {                                                                                       \
      pointwise_forward<Formula<float>>(problem, output, loop, gradient_loop);                     \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  void backward(const PointwiseProblem& problem, const BackwardInput& input,                       \
                const BackwardOutput& output) {                                                    \
    const auto loop = [](const auto& loss, const auto& tile, auto scale, auto* gradients) {        \
      backward_loop(loss, tile, scale, gradients);                                                 \
    };                                                                                             \
    if (problem.element == Element::kDouble) {                                                     \
      pointwise_backward<Formula<double>>(problem, input, output, loop);                           \
    } else {                                                                                       \
      pointwise_backward<Formula<float>>(problem, input, output, loop);                            \
    }                                                                                              \
  }                                                                                                \
  }                                                                                                \
  }
