// Rows of which only few labels are observed, and those are listed: by the target
// (Format::kObserved) or by a sparse mask. Their entries are gathered into dense tiles, which the
// loops over tiles take like any other. Cost: entries, not labels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <iterator>
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

  // Finds the observed entries of a row. Returns false if its labels cannot be told: the whole row
  // is not a number then.
  bool start_row(int64_t row) {
    row_ = row;
    next_ = 0;
    entries_.clear();
    const Labels& target = problem_.target;
    const Labels& mask = problem_.mask;
    if (target.format != Format::kPacked && !targets_.start(target, row, problem_.columns)) {
      return false;
    }
    if (mask.format == Format::kSparse && !observed_.start(mask, row, problem_.columns)) {
      return false;
    }
    if (target.format != Format::kObserved) {
      find_targets_of_observed();
    } else if (mask.format == Format::kSparse) {
      // Both are sorted. Of equal entries the target's is taken.
      std::set_intersection(targets_.begin(), targets_.end(), observed_.begin(), observed_.end(),
                            std::back_inserter(entries_), is_before);
    } else {
      std::copy_if(targets_.begin(), targets_.end(), std::back_inserter(entries_),
                   [&](const SparseSet::Entry& entry) { return is_set(mask, row, entry.column); });
    }
    return true;
  }

  // The next entries of the row, at most kTile; none when all have been seen. Targets are soft.
  Tile<Real> tile() {
    const size_t count = std::min<size_t>(kTile, entries_.size() - next_);
    for (size_t i = 0; i < count; ++i) {
      const SparseSet::Entry& entry = entries_[next_ + i];
      columns_[i] = entry.column;
      soft_[i] = entry.value <= 1 ? static_cast<Real>(entry.value)
                                  : std::numeric_limits<Real>::quiet_NaN();
    }
    next_ += count;
    Tile<Real> tile;
    tile.count = static_cast<int>(count);
    gather(problem_.logits, problem_.element, row_ * problem_.row_stride, 1, columns_, tile.count,
           logits_);
    tile.logits = logits_;
    tile.labels.kind = TargetKind::kSoft;
    tile.labels.soft = soft_;
    return tile;
  }

  // Columns of the last tile.
  const int64_t* columns() const { return columns_; }

 private:
  static bool is_before(const SparseSet::Entry& a, const SparseSet::Entry& b) {
    return a.column < b.column;
  }

  // The mask lists what is observed; what the target does not list there is a negative.
  void find_targets_of_observed() {
    const Labels& target = problem_.target;
    const SparseSet::Entry* positive = targets_.begin();
    for (const SparseSet::Entry& observed : observed_) {
      double value = 0;
      if (target.format == Format::kPacked) {
        value = is_set(target, row_, observed.column) ? 1 : 0;
      } else {
        while (positive != targets_.end() && is_before(*positive, observed)) ++positive;
        if (positive != targets_.end() && positive->column == observed.column) {
          value = positive->value;
        }
      }
      entries_.push_back({observed.column, value});
    }
  }

  const Problem& problem_;
  int64_t row_ = 0;
  size_t next_ = 0;
  SparseSet targets_;
  SparseSet observed_;
  std::vector<SparseSet::Entry> entries_;
  int64_t columns_[kTile];
  alignas(64) Real logits_[kTile];
  alignas(64) Real soft_[kTile];
};

}  // namespace mlloss::cpu
