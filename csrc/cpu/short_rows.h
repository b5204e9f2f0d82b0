// Row-wise losses of rows much shorter than a tile, several at a time: labels and logits are read
// together, and what is done once per row is done for a vector of rows. In fp32 and for hard
// targets; a tile that holds anything else (soft targets, labels that cannot be told, numbers that
// are not finite) goes row by row, as long rows do.
//
// Measured on one thread of an AMD EPYC (Zen 5, AVX-512), ZLPR in fp32 with bool targets,
// nanoseconds per element, forward / forward and backward, row by row and as here: 20 labels 7.9
// / 10.8 and 1.4 / 2.4, 64 labels 2.3 / 3.2 and 0.6 / 1.2, 256 labels 0.8 / 1.3 and 0.6 / 1.2.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/convert.h"
#include "cpu/entries.h"
#include "cpu/isa.h"
#include "cpu/labels.h"
#include "cpu/memory.h"
#include "cpu/short_row_kernels.h"
#include "math/multilabel_categorical_crossentropy.h"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss::cpu {

// Where gradients go.
struct GradientTarget {
  void* data;          // [N, C], element type of the logits
  int64_t row_stride;  // in elements
  void* threshold;     // [N], element type of the statistics; or nullptr
  bool stream;         // past the caches: nobody reads it soon, and it is not the logits
};

// ---- Loops over rows, compiled for each instruction set ----

// Results of a few rows, one array each so that vectors can be stored.
struct FinishedRows {
  alignas(64) float losses[kShortRowRun];
  alignas(64) float positive_shifts[kShortRowRun], positive_factors[kShortRowRun];
  alignas(64) float negative_shifts[kShortRowRun], negative_factors[kShortRowRun];
};

// A function of its own: in the loop, compilers would keep `statistics` in memory.
template <class Loss>
MLLOSS_INLINE void finish_row(const ShortRowSums& sums, int row, float threshold, FinishedRows& out,
                              int place) {
  RowStatistics<float> statistics;
  out.losses[place] = Loss::finish(
      ScaledSum<float>{sums.positive_largest[row], sums.positive_sum[row]},
      ScaledSum<float>{sums.negative_largest[row], sums.negative_sum[row]}, threshold, &statistics);
  out.positive_shifts[place] = statistics.positive_shift;
  out.positive_factors[place] = statistics.positive_factor;
  out.negative_shifts[place] = statistics.negative_shift;
  out.negative_factors[place] = statistics.negative_factor;
}

// Losses and statistics of rows from their sums. Returns false if any of them is not finite.
template <class Loss>
MLLOSS_INLINE bool finish_rows(const ShortRowSums& sums, const float* thresholds, int rows,
                               float* losses, RowStatistics<float>* statistics) {
  int odd = 0;
  FinishedRows run;
  for (int begin = 0; begin < rows; begin += kShortRowRun) {
    // A whole run, so that there is no remainder; what lies beyond the rows is not used.
#pragma omp simd
    for (int j = 0; j < kShortRowRun; ++j) {
      finish_row<Loss>(sums, begin + j, thresholds[begin + j], run, j);
    }
    const int count = std::min(kShortRowRun, rows - begin);
    for (int j = 0; j < count; ++j) {
      odd |= !(absolute(run.losses[j]) < kInfinity<float>);
      losses[begin + j] = run.losses[j];
      statistics[begin + j] = {run.positive_shifts[j], run.positive_factors[j],
                               run.negative_shifts[j], run.negative_factors[j]};
    }
  }
  return odd == 0;
}

// ---- A tile of rows ----

// Longer rows take no longer in tiles of their own, which hide more of the memory's latency.
constexpr int kLongestShortRow = 256;

// One thread's buffers.
template <class Loss, class Real>
class ShortRows {
 public:
  static_assert(std::is_same_v<Real, double>);
  ShortRows(const RowwiseProblem&, bool) {}
  int step() const { return 1; }
  template <class Finish>
  bool forward(int64_t, int, const Finish&, double*, RowStatistics<Real>*) {
    return false;
  }
  template <class Scale>
  bool gradients(int64_t, int, const RowStatistics<Real>*, const Scale&, const GradientTarget&) {
    return false;
  }
  template <class Scale>
  bool backward(int64_t, int, const RowStatistics<Real>*, const Scale&, const GradientTarget&) {
    return false;
  }
};

template <class Loss>
class ShortRows<Loss, float> {
 public:
  // `may_change`: the logits may be overwritten by gradients meanwhile.
  ShortRows(const RowwiseProblem& problem, bool may_change)
      : problem_(problem),
        may_change_(may_change),
        kernels_(goes_by_entries(problem) ? nullptr : short_row_kernels()),
        labels_(problem, true, Carrier::kBytes, Logits::kStored) {}

  // Rows that are taken at a time; 1 where this is not for them.
  int step() const {
    return kernels_ == nullptr || problem_.columns > kLongestShortRow ? 1 : rows_at_once(problem_);
  }

  // Losses and statistics of `rows` rows; `finish` wraps finish_rows. Returns false if they have to
  // go row by row.
  template <class Finish>
  bool forward(int64_t row, int rows, const Finish& finish, double* losses,
               RowStatistics<float>* statistics) {
    if (!read(row, rows)) return false;
    kernels_->sums(tile_, &sums_);
    if (!finish(sums_, thresholds_, rows, losses_, statistics)) return false;
    std::copy_n(losses_, rows, losses);
    return true;
  }

  // Gradients of the rows that forward() has just read, times scale(row); `target` may be the
  // logits. Returns false, with nothing written, if they have to go row by row.
  template <class Scale>
  bool gradients(int64_t row, int rows, const RowStatistics<float>* statistics, const Scale& scale,
                 const GradientTarget& target) {
    for (int r = 0; r < rows; ++r) scales_[r] = scale(row + r);
    const int columns = tile_.columns;
    if (!kernels_->gradients(tile_, statistics, scales_, gradients_)) return false;
    if (target.row_stride == columns) {
      write(gradients_, rows * columns, row * columns, target);
    } else {
      for (int r = 0; r < rows; ++r) {
        write(gradients_ + r * columns, columns, (row + r) * target.row_stride, target);
      }
    }
    write_threshold_gradients(row, rows, statistics, target);
    return true;
  }

  // The same of rows that have not been read. `target` is not the logits, its rows lie one behind
  // the other, and where this returns false anything may have been written to them.
  template <class Scale>
  bool backward(int64_t row, int rows, const RowStatistics<float>* statistics, const Scale& scale,
                const GradientTarget& target) {
    if (!read(row, rows)) return false;
    if (problem_.element != Element::kFloat || target.stream) {
      return gradients(row, rows, statistics, scale, target);
    }
    // Straight to where they belong, but for the last rows: the rest of their vectors would be
    // written to what belongs to others.
    for (int r = 0; r < rows; ++r) scales_[r] = scale(row + r);
    const int columns = tile_.columns;
    const int tail = std::min(rows, (kWidestVector + columns - 1) / columns), last = rows - tail;
    float* out = static_cast<float*>(target.data) + row * columns;
    const ShortRowTile whole = tile_;
    tile_.rows = last;
    if (!kernels_->gradients(tile_, statistics, scales_, out)) return false;
    tile_ = whole;
    tile_.rows = tail;
    tile_.logits += last * columns;
    if (tile_.hard != nullptr) tile_.hard += last * columns;
    if (tile_.observed != nullptr) tile_.observed += last * columns;
    if (!kernels_->gradients(tile_, statistics + last, scales_ + last, gradients_)) return false;
    std::copy_n(gradients_, tail * columns, out + last * columns);
    write_threshold_gradients(row, rows, statistics, target);
    return true;
  }

 private:
  bool read(int64_t row, int rows) {
    if (!labels_.start_rows(row, rows)) return false;
    const int columns = static_cast<int>(problem_.columns), count = rows * columns;
    LabelTile<float> labels;
    labels_.read(0, count, labels);
    if (labels.kind == TargetKind::kSoft) return false;
    tile_ = {logits_of(row, rows), labels.kind == TargetKind::kHard ? labels.hard : nullptr,
             labels.observed, rows, columns};
    if constexpr (Loss::kHasThreshold) {
      const Strided& threshold = problem_.threshold;
      load(threshold.data, threshold.element, row * threshold.row_stride, threshold.row_stride,
           rows, thresholds_);
      bool is_finite = true;
      for (int r = 0; r < rows; ++r) is_finite &= absolute(thresholds_[r]) < kInfinity<float>;
      return is_finite;
    }
    return true;
  }

  // Logits one behind the other, and readable kPadding elements beyond.
  const float* logits_of(int64_t row, int rows) {
    const int columns = static_cast<int>(problem_.columns), count = rows * columns;
    const int64_t stride = problem_.row_stride;
    const bool has_more = (problem_.rows - row - rows) * columns >= kPadding;
    if (!may_change_ && problem_.element == Element::kFloat && stride == columns && has_more) {
      return static_cast<const float*>(problem_.logits) + row * stride;
    }
    load_rows(problem_.logits, problem_.element, row * stride, stride, 1, rows, columns, logits_);
    std::fill_n(logits_ + count, kPadding, 0.0f);
    return logits_;
  }

  void write(const float* values, int count, int64_t offset, const GradientTarget& target) const {
    kernels_->store(values, count, problem_.element, target.stream,
                    element_at(target.data, problem_.element, offset));
  }

  void write_threshold_gradients([[maybe_unused]] int64_t row, [[maybe_unused]] int rows,
                                 [[maybe_unused]] const RowStatistics<float>* statistics,
                                 [[maybe_unused]] const GradientTarget& target) const {
    if constexpr (Loss::kHasThreshold) {
      auto* out = static_cast<float*>(target.threshold) + row;
#pragma omp simd
      for (int r = 0; r < rows; ++r) {
        const float derivative = Loss::finite_threshold_gradient(statistics[r], thresholds_[r]);
        out[r] = scales_[r] == 0 ? 0.0f : static_cast<float>(scales_[r] * derivative);
      }
    }
  }

  const RowwiseProblem& problem_;
  const bool may_change_;
  const ShortRowKernels* const kernels_;
  LabelReader<float> labels_;
  ShortRowTile tile_ = {};
  alignas(64) float logits_[kTile + kPadding];
  alignas(64) float gradients_[kTile + kPadding];
  ShortRowSums sums_;
  alignas(64) float thresholds_[kTile];
  alignas(64) float losses_[kTile];
  double scales_[kTile];
};

}  // namespace mlloss::cpu
