// Targets and masks of every format, read tile by tile into the few forms that the loops know.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/convert.h"
#include "problem.h"

namespace mlloss::cpu {

// Columns that are decoded at a time: a tile of logits, targets and mask stays in the L1 cache.
constexpr int kTile = 2048;

enum class TargetKind { kNone, kHard, kSoft };

template <class Real>
struct LabelTile {
  TargetKind kind = TargetKind::kNone;  // kNone: no positive in this tile
  const uint8_t* hard = nullptr;        // kHard: [count], nonzero = positive
  const Real* soft = nullptr;           // kSoft: [count], NaN where the target is invalid
  const uint8_t* observed = nullptr;    // [count], nonzero = use; nullptr = use everything
  bool empty = false;                   // nothing is observed
};

// The entries of one sparse row within a range of columns, as a set: sorted, without duplicates.
class SparseRow {
 public:
  struct Entry {
    int64_t column;
    double value;
  };

  // Returns false if the row has an index beyond `columns` or invalid offsets.
  bool start(const Labels& labels, int64_t row, int64_t begin, int64_t end, int64_t columns);

  // The entries in [begin, begin + count); calls go from left to right.
  struct Range {
    const Entry* first;
    const Entry* last;
  };
  Range next(int64_t begin, int count);

 private:
  std::vector<Entry> entries_;
  size_t cursor_ = 0;
};

template <class Real>
class LabelReader {
 public:
  // `prefer_hard`: report soft-typed targets as hard where a tile holds only 0 and 1.
  LabelReader(const Problem& problem, bool prefer_hard)
      : problem_(problem), prefer_hard_(prefer_hard) {}

  // Columns [begin, end) of a row follow.
  void start_row(int64_t row, int64_t begin, int64_t end);

  // The next `count` <= kTile columns, from left to right.
  LabelTile<Real> tile(int64_t begin, int count);

 private:
  void read_target(int64_t begin, int count, LabelTile<Real>& tile);
  void read_dense_target(int64_t begin, int count, LabelTile<Real>& tile);
  void read_mask(int64_t begin, int count, LabelTile<Real>& tile);

  const Problem& problem_;
  const bool prefer_hard_;
  int64_t row_ = 0;
  bool row_is_valid_ = true;
  bool mask_is_valid_ = true;
  SparseRow target_row_;
  SparseRow mask_row_;
  alignas(64) Real soft_[kTile];
  alignas(64) uint8_t hard_[kTile];
  alignas(64) uint8_t not_ignored_[kTile];
  alignas(64) uint8_t observed_[kTile];
};

int64_t count_nonzero(const uint8_t* bytes, int count);

}  // namespace mlloss::cpu
