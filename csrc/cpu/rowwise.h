// Forward and backward pass of losses that are a function of two sums over a row: of e^-x over its
// positives and of e^x over its negatives. See math/multilabel_categorical_crossentropy.h.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/pointwise.h"
#include "cpu/short_rows.h"
#include "cpu/tiles.h"
#include "cpu/vector_kernels.h"
#include "cpu/work.h"
#include "math/multilabel_categorical_crossentropy.h"
#include "math/reduction.h"
#include "problem.h"

namespace mlloss::cpu {

// ---- Loops over a tile ----

// Sum of factor(i) e^value(i), i < count. Factors are bool, or numbers in [0, 1] or NaN; 0 leaves a
// value out. Two passes over values that are in the L1 cache, with one exponential each.
template <class Real, class Value, class Factor>
MLLOSS_INLINE ScaledSum<double> scaled_sum(int count, const Value& value, const Factor& factor) {
  constexpr bool kSelects = std::is_same_v<decltype(factor(0)), bool>;
  const Real largest = lane_max(count, -kInfinity<Real>, [&](int i) MLLOSS_INLINE_LAMBDA {
    const Real x = value(i);
    if constexpr (kSelects) return factor(i) ? x : -kInfinity<Real>;
    return factor(i) != 0 ? x : -kInfinity<Real>;
  });
  if (absolute(largest) == kInfinity<Real>) {
    // The difference to it would be NaN, and the fast exponential takes no positive arguments.
    double sum = 0;
    for (int i = 0; i < count; ++i) {
      if (factor(i) != 0) sum += factor(i) * std::exp(static_cast<double>(value(i)));
    }
    return {largest, sum};
  }
  const Real sum = lane_sum<Real>(count, [&](int i) MLLOSS_INLINE_LAMBDA {
    const Real e = exp_nonpositive(value(i) - largest);
    if constexpr (kSelects) return factor(i) ? e : Real(0);
    return factor(i) != 0 ? Real(factor(i)) * e : Real(0);
  });
  return {largest, sum};
}

// Positions of the nonzero bytes, at most `capacity` of them; returns how many there are.
inline int find_nonzero(const uint8_t* bytes, int count, int* positions, int capacity) {
  int found = 0;
  const auto look = [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      if (bytes[i] == 0) continue;
      if (found < capacity) positions[found] = i;
      ++found;
    }
  };
  int i = 0;
  // Eight at a time: nearly all are zero.
  for (; i + 8 <= count; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, sizeof word);
    if (word != 0) look(i, i + 8);
  }
  look(i, count);
  return found;
}

// Positives in a tile up to which they are taken one by one, beside a vectorised loop over the
// negatives; more go through a loop over both sides.
constexpr int kFewPositives = kTile / 16;

// Hard targets (or none at all: `hard` is nullptr).
template <bool kMasked, class Real>
MLLOSS_INLINE RowSums<double> hard_sums(const Tile<Real>& tile, const uint8_t* hard) {
  const Real* logits = tile.logits;
  const uint8_t* observed = tile.labels.observed;
  const auto logit = [=](int i) MLLOSS_INLINE_LAMBDA { return logits[i]; };
  const auto is_observed = [=](int i) MLLOSS_INLINE_LAMBDA {
    if constexpr (kMasked) return observed[i] != 0;
    return true;
  };
  int positions[kFewPositives];
  const int positives =
      hard == nullptr ? 0 : find_nonzero(hard, tile.count, positions, kFewPositives);
  RowSums<double> sums = RowSums<double>::empty();
  if (positives == 0) {
    sums.negative = scaled_sum<Real>(tile.count, logit, is_observed);
    return sums;
  }
  sums.negative = scaled_sum<Real>(tile.count, logit, [=](int i) MLLOSS_INLINE_LAMBDA {
    return (hard[i] == 0) & is_observed(i);
  });
  if (positives <= kFewPositives) {
    Real values[kFewPositives];
    int count = 0;
    for (int k = 0; k < positives; ++k) {
      if (is_observed(positions[k])) values[count++] = -logits[positions[k]];
    }
    sums.positive = scaled_sum<Real>(
        count, [&](int i) MLLOSS_INLINE_LAMBDA { return values[i]; },
        [](int) MLLOSS_INLINE_LAMBDA { return true; });
  } else {
    sums.positive = scaled_sum<Real>(
        tile.count, [=](int i) MLLOSS_INLINE_LAMBDA { return -logits[i]; },
        [=](int i) MLLOSS_INLINE_LAMBDA { return (hard[i] != 0) & is_observed(i); });
  }
  return sums;
}

// Soft targets: factors y and 1 - y.
template <bool kMasked, class Real>
MLLOSS_INLINE RowSums<double> soft_sums(const Tile<Real>& tile) {
  const Real* logits = tile.logits;
  const Real* soft = tile.labels.soft;
  const uint8_t* observed = tile.labels.observed;
  const auto observed_only = [=](int i, Real factor) MLLOSS_INLINE_LAMBDA {
    if constexpr (kMasked) return observed[i] != 0 ? factor : Real(0);
    return factor;
  };
  return {scaled_sum<Real>(
              tile.count, [=](int i) MLLOSS_INLINE_LAMBDA { return -logits[i]; },
              [=](int i) MLLOSS_INLINE_LAMBDA { return observed_only(i, soft[i]); }),
          scaled_sum<Real>(
              tile.count, [=](int i) MLLOSS_INLINE_LAMBDA { return logits[i]; },
              [=](int i) MLLOSS_INLINE_LAMBDA { return observed_only(i, 1 - soft[i]); })};
}

template <class Real>
MLLOSS_INLINE RowSums<double> sums_of_tile(const Tile<Real>& tile) {
  const bool masked = tile.labels.observed != nullptr;
  if (tile.labels.kind == TargetKind::kSoft) {
    return masked ? soft_sums<true>(tile) : soft_sums<false>(tile);
  }
  const uint8_t* hard = tile.labels.kind == TargetKind::kHard ? tile.labels.hard : nullptr;
  return masked ? hard_sums<true>(tile, hard) : hard_sums<false>(tile, hard);
}

// gradients[i] = scale * (-y k_p e^(-x - m_p) + (1 - y) k_n e^(x - m_n)), 0 where masked.
template <class Real>
MLLOSS_INLINE void gradients_of_tile(const Tile<Real>& tile, const RowStatistics<Real>& statistics,
                                     Real scale, Real* gradients) {
  const Real positive_factor = -scale * statistics.positive_factor;
  const Real negative_factor = scale * statistics.negative_factor;
  const Real positive_shift = statistics.positive_shift;
  const Real negative_shift = statistics.negative_shift;
  const uint8_t* hard = tile.labels.hard;
  const Real* soft = tile.labels.soft;
  const uint8_t* observed = tile.labels.observed;
  if (tile.labels.kind == TargetKind::kNone) {
#pragma omp simd
    for (int i = 0; i < tile.count; ++i) {
      gradients[i] = negative_factor * exp_nonpositive(tile.logits[i] - negative_shift);
    }
  } else if (tile.labels.kind == TargetKind::kHard) {
#pragma omp simd
    for (int i = 0; i < tile.count; ++i) {
      const bool is_positive = hard[i] != 0;
      const Real x = tile.logits[i];
      const Real e = exp_nonpositive(is_positive ? -x - positive_shift : x - negative_shift);
      gradients[i] = (is_positive ? positive_factor : negative_factor) * e;
    }
  } else {
#pragma omp simd
    for (int i = 0; i < tile.count; ++i) {
      const Real x = tile.logits[i], y = soft[i];
      const Real positive = y * exp_nonpositive(-x - positive_shift);
      const Real negative = (1 - y) * exp_nonpositive(x - negative_shift);
      // Selected: an infinite logit may meet a factor of 0.
      gradients[i] = (y == 0 ? Real(0) : positive_factor * positive) +
                     (y == 1 ? Real(0) : negative_factor * negative);
    }
  }
  if (observed != nullptr) {
#pragma omp simd
    for (int i = 0; i < tile.count; ++i) gradients[i] = observed[i] != 0 ? gradients[i] : Real(0);
  }
}

// ---- The whole matrix ----

// The number of a row, 1 without data.
inline double value_at(const Strided& array, int64_t row) {
  if (array.data == nullptr) return 1;
  double value;
  load(array.data, array.element, row * array.row_stride, 0, 1, &value);
  return value;
}

// A constant weight of a row: NaN where negative.
inline double weight_at(const Strided& weight, int64_t row) {
  const double value = value_at(weight, row);
  return value < 0 ? kNaN<double> : value;
}

// Weighs and reduces the losses of the rows.
template <class Real>
void reduce_rows(const RowwiseProblem& problem, const std::vector<double>& losses,
                 const ForwardOutput& output) {
  PartialSum sum;
  for (int64_t row = 0; row < problem.rows; ++row) {
    const double weight = weight_at(problem.weight, row);
    const double loss = weight == 0 ? 0.0 : weight * losses[row];
    if (problem.reduction == Reduction::kNone) {
      static_cast<Real*>(output.loss)[row] = static_cast<Real>(loss);
    }
    sum.total += loss;
    sum.denominator += counted_row(problem.reduction, weight);
  }
  finish_sum(problem, sum, output);
}

// Calls body(tile, begin) for the tiles of a piece's row; a row of which only the listed labels are
// observed has those alone.
template <class Real, class Body>
void for_row_tiles(const Problem& problem, const Piece& piece, int64_t row, TileReader<Real>& tiles,
                   EntryReader<Real>& entries, const Body& body) {
  if (!goes_by_entries(problem)) {
    for_tiles<Tile<Real>>(piece, row, tiles, body);
    return;
  }
  entries.start_row(row);
  Tile<Real> tile;
  while (entries.read(tile)) body(tile, int64_t(0));
}

// The vectorised loops, or nullptr.
template <class Real>
const VectorKernels* vector_kernels_for(const Problem& problem) {
  return std::is_same_v<Real, float> && !goes_by_entries(problem) ? vector_kernels() : nullptr;
}

// Whether the loops that know bits will run: the others are but a fallback.
inline Carrier carrier_for(const VectorKernels* vector, const Problem& problem) {
  return vector != nullptr && has_bits(problem) ? Carrier::kBits : Carrier::kBytes;
}

// One thread's readers of rows.
template <class Real>
struct RowReader {
  const VectorKernels* vector;
  TileReader<Real> tiles;
  EntryReader<Real> entries;
  RowOfEntries<Real> row_of_entries;

  explicit RowReader(const Problem& problem)
      : vector(vector_kernels_for<Real>(problem)),
        tiles(problem, true, carrier_for(vector, problem),
              vector != nullptr ? Logits::kWide : Logits::kDecoded),
        entries(problem) {}
};

// Sums of a piece of a row; `sums` wraps sums_of_tile.
template <class Real, class Sums>
RowSums<double> sums_of_piece(const Problem& problem, const Piece& piece, int64_t row,
                              RowReader<Real>& reader, const Sums& sums) {
  RunningSums running;
  RowSums<double> others = RowSums<double>::empty();
  bool has_others = false;
  const VectorKernels* vector = reader.vector;
  for_row_tiles(problem, piece, row, reader.tiles, reader.entries, [&](Tile<Real>& tile, int64_t) {
    if (tile.labels.empty) return;
    int taken = 0;
    if constexpr (std::is_same_v<Real, float>) {
      const bool is_soft = tile.labels.kind == TargetKind::kSoft;
      if (vector != nullptr && !is_soft) taken = vector->exponential_sums(tile, &running);
    }
    if (taken == tile.count) return;
    for_parts(tile, [&](Tile<Real>& part, int begin) {
      if (begin < taken) return;
      if (vector != nullptr) reader.tiles.decode(part);
      others = has_others ? combine(others, sums(part)) : sums(part);
      has_others = true;
    });
  });
  if (vector == nullptr) return others;
  return has_others ? combine(running.scaled(), others) : running.scaled();
}

// Combines the pieces of a row, the first of which is `parts`.
inline RowSums<double> combined(const RowSums<double>* parts, int64_t count) {
  RowSums<double> sum = RowSums<double>::empty();
  for (int64_t i = 0; i < count; ++i) {
    sum = combine(sum, parts[i]);
  }
  return sum;
}

// Writes the gradients of a piece of a row, times `scale`; `gradients` wraps gradients_of_tile.
// `target` may be the logits.
template <class Loss, class Real, class Gradients>
void write_gradients(const RowwiseProblem& problem, const Piece& piece, int64_t row, double scale,
                     const RowStatistics<Real>& statistics, const GradientTarget& target,
                     RowReader<Real>& reader, const Gradients& gradients) {
  const bool by_entries = goes_by_entries(problem);
  alignas(64) Real buffer[kTile];
  if constexpr (Loss::kHasThreshold) {
    if (piece.column_begin == 0) {
      const Real threshold = static_cast<Real>(value_at(problem.threshold, row));
      const Real derivative = Loss::threshold_gradient(statistics, threshold);
      static_cast<Real*>(target.threshold)[row] =
          scale == 0 ? Real(0) : static_cast<Real>(scale * derivative);
    }
  }
  reader.row_of_entries.clear();
  const VectorKernels* vector = reader.vector;
  const auto write = [&](Tile<Real>& tile, int64_t begin) {
    const int64_t offset = row * target.row_stride + begin;
    const bool is_zero = tile.labels.empty || scale == 0;
    if (vector != nullptr && !is_zero) {
      if constexpr (std::is_same_v<Real, float>) {
        if (tile.labels.kind != TargetKind::kSoft &&
            vector->exponential_gradients(tile, statistics, static_cast<float>(scale),
                                          target.stream,
                                          element_at(target.data, problem.element, offset))) {
          return;
        }
      }
    }
    for_parts(tile, [&](Tile<Real>& part, int part_begin) {
      const int64_t own_offset = offset + part_begin;
      Real* out = by_entries ? reader.row_of_entries.add(reader.entries.columns(), part.count)
                  : problem.element == kElementOf<Real>
                      ? static_cast<Real*>(target.data) + own_offset
                      : buffer;
      if (is_zero) {
        std::fill_n(out, part.count, Real(0));
      } else {
        if (vector != nullptr) reader.tiles.decode(part);
        gradients(part, statistics, static_cast<Real>(scale), out);
      }
      if (out == buffer) store(buffer, part.count, target.data, problem.element, own_offset);
    });
  };
  for_row_tiles(problem, piece, row, reader.tiles, reader.entries, write);
  if (by_entries) reader.row_of_entries.write(problem, target.data, row * target.row_stride);
}

// Pieces of a problem, with as many rows as short rows are taken at a time.
template <class Loss, class Real>
Pieces pieces_of_rows(const RowwiseProblem& problem, bool writes_rows) {
  return goes_by_entries(problem) ? pieces_of_entries(problem, writes_rows)
                                  : Pieces(problem.rows, problem.columns)
                                        .of_groups(ShortRows<Loss, Real>(problem, false).step());
}

// Calls take(row, rows) for the rows of a piece, several at a time if they are short; where it
// returns false, body(row) for each of them.
template <class ShortRows, class Take, class Body>
void for_rows(const Piece& piece, const ShortRows& short_rows, const Take& take, const Body& body) {
  const int64_t step = short_rows.step();
  for (int64_t row = piece.row_begin; row < piece.row_end; row += step) {
    const int64_t end = std::min(row + step, piece.row_end);
    if (step > 1 && take(row, static_cast<int>(end - row))) continue;
    for (int64_t own = row; own < end; ++own) body(own);
  }
}

// Loss and gradient in one pass: of each row first the sums, then the gradients, while it is in the
// cache. Long rows go in groups of as many elements as there is work for all threads.
template <class Loss, class Real, class Sums, class Finish, class Gradients>
void rowwise_one_pass(const RowwiseProblem& problem, const ForwardOutput& output, const Sums& sums,
                      const Finish& finish_rows, const Gradients& gradients) {
  constexpr int64_t kGroup = 64 * kPiece;
  const Pieces pieces = pieces_of_rows<Loss, Real>(problem, true);
  auto* statistics = static_cast<RowStatistics<Real>*>(output.statistics);
  std::vector<double> losses(problem.rows);
  double counted = 0;
  for (int64_t row = 0; row < problem.rows; ++row) {
    counted += counted_row(problem.reduction, weight_at(problem.weight, row));
  }
  const double scale = scaled_for_gradient(
      scale_of(denominator_of(problem.reduction, counted, problem.batch, problem.normalizer)),
      output);
  const GradientTarget target{output.gradient, problem.row_stride, output.gradient_threshold,
                              false};
  const auto finish = [&](int64_t row, const RowSums<double>& sum) {
    losses[row] = Loss::finish(sum.positive, sum.negative, value_at(problem.threshold, row),
                               statistics + row);
  };
  const auto scale_of_row = [&](int64_t row) {
    const double weight = weight_at(problem.weight, row);
    return weight == 0 ? 0.0 : weight * scale;
  };
  const int64_t per_row = pieces.per_row();
  const int64_t group =
      per_row == 1 ? pieces.count() : std::max<int64_t>(1, kGroup / problem.columns) * per_row;
  std::vector<RowSums<double>> partial(per_row > 1 ? group : 0);
  for (int64_t begin = 0; begin < pieces.count(); begin += group) {
    const int64_t end = std::min(begin + group, pieces.count());
    for_pieces(begin, end, [&](int64_t first, int64_t last) {
      RowReader<Real> reader(problem);
      ShortRows<Loss, Real> short_rows(problem, true);
      for (int64_t index = first; index < last; ++index) {
        const Piece piece = pieces[index];
        const auto write = [&](int64_t row) {
          write_gradients<Loss>(problem, piece, row, scale_of_row(row), statistics[row], target,
                                reader, gradients);
        };
        const auto take = [&](int64_t row, int rows) {
          if (!short_rows.forward(row, rows, finish_rows, losses.data() + row, statistics + row)) {
            return false;
          }
          if (!short_rows.gradients(row, rows, statistics + row, scale_of_row, target)) {
            for (int64_t own = row; own < row + rows; ++own) write(own);
          }
          return true;
        };
        for_rows(piece, short_rows, take, [&](int64_t row) {
          const auto sum = sums_of_piece(problem, piece, row, reader, sums);
          if (per_row > 1) {
            partial[index - begin] = sum;
            return;
          }
          finish(row, sum);
          write(row);
        });
      }
    });
    if (per_row == 1) break;
    for (int64_t index = begin; index < end; index += per_row) {
      finish(index / per_row, combined(partial.data() + (index - begin), per_row));
    }
    for_pieces(begin, end, [&](int64_t first, int64_t last) {
      RowReader<Real> reader(problem);
      for (int64_t index = first; index < last; ++index) {
        const Piece piece = pieces[index];
        const int64_t row = piece.row_begin;
        write_gradients<Loss>(problem, piece, row, scale_of_row(row), statistics[row], target,
                              reader, gradients);
      }
    });
  }
  reduce_rows<Real>(problem, losses, output);
}

// Loss alone.
template <class Loss, class Real, class Sums, class Finish>
void rowwise_losses(const RowwiseProblem& problem, const ForwardOutput& output, const Sums& sums,
                    const Finish& finish_rows) {
  const Pieces pieces = pieces_of_rows<Loss, Real>(problem, false);
  auto* statistics = static_cast<RowStatistics<Real>*>(output.statistics);
  std::vector<double> losses(problem.rows);
  // Sums of the pieces of long rows, to be combined in order.
  std::vector<RowSums<double>> partial(pieces.per_row() > 1 ? pieces.count() : 0);
  const auto finish = [&](int64_t row, const RowSums<double>& sum) {
    losses[row] = Loss::finish(sum.positive, sum.negative, value_at(problem.threshold, row),
                               statistics + row);
  };
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    RowReader<Real> reader(problem);
    ShortRows<Loss, Real> short_rows(problem, false);
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      const auto take = [&](int64_t row, int rows) {
        return short_rows.forward(row, rows, finish_rows, losses.data() + row, statistics + row);
      };
      for_rows(piece, short_rows, take, [&](int64_t row) {
        const auto sum = sums_of_piece(problem, piece, row, reader, sums);
        if (partial.empty()) {
          finish(row, sum);
        } else {
          partial[index] = sum;
        }
      });
    }
  });
  if (!partial.empty()) {
    for (int64_t row = 0; row < problem.rows; ++row) {
      finish(row, combined(partial.data() + row * pieces.per_row(), pieces.per_row()));
    }
  }
  reduce_rows<Real>(problem, losses, output);
}

// Loss: the row loss, with static finish(); `sums` wraps sums_of_tile, `finish_rows` finish_rows,
// `gradients` gradients_of_tile.
template <class Loss, class Real, class Sums, class Finish, class Gradients>
void rowwise_forward(const RowwiseProblem& problem, const ForwardOutput& output, const Sums& sums,
                     const Finish& finish_rows, const Gradients& gradients) {
  if (output.gradient != nullptr) {
    rowwise_one_pass<Loss, Real>(problem, output, sums, finish_rows, gradients);
  } else {
    rowwise_losses<Loss, Real>(problem, output, sums, finish_rows);
  }
}

template <class Loss, class Real, class Gradients>
void rowwise_backward(const RowwiseProblem& problem, const BackwardInput& input,
                      const BackwardOutput& output, const Gradients& gradients) {
  const Pieces pieces = pieces_of_rows<Loss, Real>(problem, true);
  const auto* statistics = static_cast<const RowStatistics<Real>*>(input.statistics);
  const GradientTarget target{output.grad_input, problem.columns, output.grad_threshold,
                              is_streamed(problem)};
  prefer_huge_pages(output.grad_input,
                    problem.rows * problem.columns * element_size(problem.element));
  const bool is_uniform = input.grad_output.row_stride == 0;
  const double upstream =
      is_uniform && problem.rows > 0 ? value_at(input.grad_output, 0) : 0;  // may have no memory
  const auto scale_of_row = [&](int64_t row) {
    const double weight = weight_at(problem.weight, row);
    const double own = is_uniform ? upstream : value_at(input.grad_output, row);
    return weight == 0 ? 0.0 : weight * *input.scale * own;
  };
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    RowReader<Real> reader(problem);
    ShortRows<Loss, Real> short_rows(problem, false);
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      const auto take = [&](int64_t row, int rows) {
        return short_rows.backward(row, rows, statistics + row, scale_of_row, target);
      };
      for_rows(piece, short_rows, take, [&](int64_t row) {
        write_gradients<Loss>(problem, piece, row, scale_of_row(row), statistics[row], target,
                              reader, gradients);
      });
    }
    if (reader.vector != nullptr && target.stream) reader.vector->fence();
  });
}

}  // namespace mlloss::cpu

// Defines the loops of a loss over sums, compiled for each instruction set.
#define MLLOSS_ROWWISE_SUMS(name, Loss)                                                            \
  namespace mlloss::cpu::name {                                                                    \
  MLLOSS_CLONES RowSums<double> sums_loop(const Tile<float>& tile) { return sums_of_tile(tile); }  \
  MLLOSS_CLONES RowSums<double> sums_loop(const Tile<double>& tile) { return sums_of_tile(tile); } \
  MLLOSS_CLONES bool finish_loop(const ShortRowSums& sums, const float* thresholds, int rows,      \
                                 float* losses, RowStatistics<float>* statistics) {                \
    return finish_rows<Loss>(sums, thresholds, rows, losses, statistics);                          \
  }                                                                                                \
  }

// Defines the kernels of a loss, declared in kernels.h, from its formula, a header in math/.
#define MLLOSS_ROWWISE_KERNELS(name, Loss)                                                      \
  MLLOSS_ROWWISE_SUMS(name, Loss)                                                               \
  namespace mlloss::cpu::name {                                                                 \
  MLLOSS_CLONES void gradients_loop(const Tile<float>& tile,                                    \
                                    const RowStatistics<float>& statistics, float scale,        \
                                    float* out) {                                               \
    gradients_of_tile(tile, statistics, scale, out);                                            \
  }                                                                                             \
  MLLOSS_CLONES void gradients_loop(const Tile<double>& tile,                                   \
                                    const RowStatistics<double>& statistics, double scale,      \
                                    double* out) {                                              \
    gradients_of_tile(tile, statistics, scale, out);                                            \
  }                                                                                             \
                                                                                                \
  void forward(const RowwiseProblem& problem, const ForwardOutput& output) {                    \
    const auto loop = [](const auto& tile) { return sums_loop(tile); };                         \
    const auto gradient_loop = [](const auto& tile, const auto& statistics, auto scale,         \
                                  auto* out) { gradients_loop(tile, statistics, scale, out); }; \
    if (problem.element == Element::kDouble) {                                                  \
      rowwise_forward<Loss, double>(problem, output, loop, finish_loop, gradient_loop);         \
    } else {                                                                                    \
      rowwise_forward<Loss, float>(problem, output, loop, finish_loop, gradient_loop);          \
    }                                                                                           \
  }                                                                                             \
                                                                                                \
  void backward(const RowwiseProblem& problem, const BackwardInput& input,                      \
                const BackwardOutput& output) {                                                 \
    const auto loop = [](const auto& tile, const auto& statistics, auto scale, auto* out) {     \
      gradients_loop(tile, statistics, scale, out);                                             \
    };                                                                                          \
    if (problem.element == Element::kDouble) {                                                  \
      rowwise_backward<Loss, double>(problem, input, output, loop);                             \
    } else {                                                                                    \
      rowwise_backward<Loss, float>(problem, input, output, loop);                              \
    }                                                                                           \
  }                                                                                             \
  }
