// Rows of which only few labels are observed, and those are listed: by the target
// (Format::kObserved) or by a sparse mask. Their entries are gathered into dense tiles, which the
// loops over tiles take like any other. Cost: entries, not labels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/convert.h"
#include "cpu/labels.h"
#include "cpu/tiles.h"
#include "cpu/work.h"
#include "problem.h"

namespace mlloss::cpu {

// Columns that cost as much as an entry: reading is scattered, and unsorted ids are sorted first.
constexpr int64_t kColumnsPerEntry = 32;

// Whether to go by entries. Depends on shapes alone.
inline bool goes_by_entries(const Problem& problem) {
  if (problem.target.format == Format::kObserved) return true;
  return problem.mask.format == Format::kSparse && problem.target.format != Format::kDense &&
         problem.mask.entries < problem.rows * (problem.columns / kColumnsPerEntry);
}

// Pieces of whole rows.
inline Pieces pieces_of_entries(const Problem& problem, bool writes_rows) {
  const int64_t entries = problem.target.entries + problem.mask.entries;
  const int64_t per_row = entries / std::max<int64_t>(problem.rows, 1);
  return Pieces::of_rows(problem.rows, problem.columns, writes_rows ? problem.columns : per_row);
}

template <class Real>
class EntryReader {
 public:
  explicit EntryReader(const Problem& problem) : problem_(problem) {}

  // Finds the observed entries of a row. Where its labels cannot be told, these are all that the
  // mask leaves in, and their targets are invalid.
  void start_row(int64_t row) {
    row_ = row;
    next_ = 0;
    const Labels& target = problem_.target;
    const Labels& mask = problem_.mask;
    const bool mask_is_valid =
        mask.format != Format::kSparse || observed_.start(mask, row, problem_.columns);
    const bool is_valid = mask_is_valid && (target.format == Format::kPacked ||
                                            targets_.start(target, row, problem_.columns));
    if (is_valid && target.format == Format::kObserved && mask.data == nullptr) {
      all_columns_ = targets_.columns();
      all_values_ = targets_.values();
      size_ = targets_.size();
      return;
    }
    columns_.clear();
    values_.clear();
    if (!is_valid) {
      invalidate_observed(mask_is_valid);
    } else if (target.format == Format::kObserved) {
      select_observed_targets();
    } else {
      find_targets_of_observed();
    }
    all_columns_ = columns_.data();
    all_values_ = values_.data();
    size_ = static_cast<int64_t>(columns_.size());
  }

  // Reads the next entries of the row, at most kTile; false when all have been seen. Targets are
  // soft.
  bool read(Tile<Real>& tile) {
    tile = Tile<Real>();
    tile.count = static_cast<int>(std::min<int64_t>(kTile, size_ - next_));
    if (tile.count == 0) return false;
    columns_of_tile_ = all_columns_ + next_;
    for (int i = 0; i < tile.count; ++i) {
      const double value = all_values_ == nullptr ? 1.0 : all_values_[next_ + i];
      soft_[i] = value <= 1 ? static_cast<Real>(value) : std::numeric_limits<Real>::quiet_NaN();
    }
    gather(problem_.logits, problem_.element, row_ * problem_.row_stride, 1, columns_of_tile_,
           tile.count, logits_);
    next_ += tile.count;
    tile.logits = logits_;
    tile.labels.kind = TargetKind::kSoft;
    tile.labels.soft = soft_;
    return true;
  }

  // Columns of the last tile.
  const int64_t* columns() const { return columns_of_tile_; }

 private:
  void add(int64_t column, double value) {
    columns_.push_back(column);
    values_.push_back(value);
  }

  static double value_at(const SparseSet& set, int64_t i) {
    return set.values() == nullptr ? 1.0 : set.values()[i];
  }

  void invalidate_observed(bool mask_is_valid) {
    constexpr double kInvalid = std::numeric_limits<double>::infinity();
    if (mask_is_valid && problem_.mask.format == Format::kSparse) {
      for (int64_t i = 0; i < observed_.size(); ++i) add(observed_.columns()[i], kInvalid);
      return;
    }
    for (int64_t column = 0; column < problem_.columns; ++column) {
      if (!mask_is_valid || is_set(problem_.mask, row_, column)) add(column, kInvalid);
    }
  }

  // The target lists what may be observed, the mask selects.
  void select_observed_targets() {
    const bool has_list = problem_.mask.format == Format::kSparse;
    int64_t next = 0;  // in the mask's list; both lists are sorted
    for (int64_t i = 0; i < targets_.size(); ++i) {
      const int64_t column = targets_.columns()[i];
      bool is_observed;
      if (has_list) {
        while (next < observed_.size() && observed_.columns()[next] < column) ++next;
        is_observed = next < observed_.size() && observed_.columns()[next] == column;
      } else {
        is_observed = is_set(problem_.mask, row_, column);
      }
      if (is_observed) add(column, value_at(targets_, i));
    }
  }

  // The mask lists what is observed; what the target does not list there is a negative.
  void find_targets_of_observed() {
    int64_t next = 0;  // in the target's list
    for (int64_t i = 0; i < observed_.size(); ++i) {
      const int64_t column = observed_.columns()[i];
      double value = 0;
      if (problem_.target.format == Format::kPacked) {
        value = is_set(problem_.target, row_, column) ? 1 : 0;
      } else {
        while (next < targets_.size() && targets_.columns()[next] < column) ++next;
        if (next < targets_.size() && targets_.columns()[next] == column) {
          value = value_at(targets_, next);
        }
      }
      add(column, value);
    }
  }

  const Problem& problem_;
  int64_t row_ = 0;
  SparseSet targets_;
  SparseSet observed_;
  std::vector<int64_t> columns_;
  std::vector<double> values_;
  // The entries of the row: of `targets_`, or what was put together here.
  const int64_t* all_columns_ = nullptr;
  const double* all_values_ = nullptr;  // nullptr = all 1
  int64_t size_ = 0, next_ = 0;
  const int64_t* columns_of_tile_ = nullptr;
  alignas(64) Real logits_[kTile];
  alignas(64) Real soft_[kTile];
};

}  // namespace mlloss::cpu
