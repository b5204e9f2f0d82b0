// Targets and masks of every format, read tile by tile into the few forms that the loops know.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/convert.h"
#include "problem.h"

namespace mlloss::cpu {

// Columns that are decoded at a time: a tile of logits, targets and mask stays in the L1 cache.
constexpr int kTile = 2048;

// Columns that are read at a time where loops take logits as they are stored, and labels so or as
// bits. So many that what a tile costs beside its elements does not count.
constexpr int kWideTile = 8 * kTile;

// Rows that are read as one tile. A row costs as much as a tile of its own, unless it is short and
// lies behind the one before.
inline int rows_at_once(const Problem& problem) {
  const int64_t columns = problem.columns;
  if (problem.rows <= 1 || columns == 0 || columns > kTile / 2) return 1;
  const int rows = kTile / static_cast<int>(columns);
  // As many as make whole groups of what the vectorised loops take at a time, if that leaves out
  // few: then a tile also begins where a cache line does.
  constexpr int kElements = 64;
  const int step = kElements / std::gcd(kElements, static_cast<int>(columns));
  const int whole = rows / step * step;
  return whole >= rows - rows / 8 ? whole : rows;
}

enum class TargetKind { kNone, kHard, kSoft };

template <class Real>
struct LabelTile {
  TargetKind kind = TargetKind::kNone;  // kNone: no positive in this tile
  const uint8_t* hard = nullptr;        // kHard: [count], nonzero = positive
  const Real* soft = nullptr;           // kSoft: [count], NaN where the target is invalid
  const uint8_t* observed = nullptr;    // [count], nonzero = use; nullptr = use everything
  bool empty = false;                   // nothing is observed, as far as the reader looked
  // In the place of `hard` and `observed` for a reader of bits: [count / 32 rounded up], those
  // beyond `count` are anything.
  const uint32_t* hard_bits = nullptr;
  const uint32_t* observed_bits = nullptr;
};

// How a reader gives hard targets and masks.
enum class Carrier { kBytes, kBits };

// How a reader gives logits: as numbers, or as they are stored, also by wide tiles where the labels
// allow it. What stands beside them per element has only kTile elements.
enum class Logits { kDecoded, kStored, kWide };

// Whether labels can be read as bits: neither target nor mask has an element per label.
inline bool has_bits(const Problem& problem) {
  const auto is_list = [](const Labels& labels) {
    return labels.data == nullptr || labels.format == Format::kPacked ||
           (labels.format == Format::kSparse && labels.values == nullptr);
  };
  return is_list(problem.target) && is_list(problem.mask);
}

// The entries of one sparse row within a range of columns, tile by tile. Within a tile they are in
// any order and may repeat.
class SparseRow {
 public:
  // Returns false if the row has an index beyond `columns` or invalid offsets. `width`: the columns
  // of a tile, a power of two.
  bool start(const Labels& labels, int64_t row, int64_t begin, int64_t end, int64_t columns,
             int width);

  // The entries of the next tile, from left to right.
  struct Range {
    const int64_t* first;  // columns, counted from the beginning of the range
    const int64_t* last;
    const double* values;  // or nullptr; infinity where invalid
  };
  Range next();

  // Where an entry stands in its tile.
  int place(int64_t column) const {
    return static_cast<int>(column & ((int64_t(1) << shift_) - 1));
  }

 private:
  template <class Index>
  bool scan(const Index* indices, const Labels& labels, int64_t first, int64_t last, int64_t begin,
            int64_t end, int64_t columns);
  void order_by_tile(int64_t tiles);

  std::vector<int64_t> columns_, ordered_columns_;
  std::vector<double> values_, ordered_values_;
  std::vector<int64_t> places_;
  bool is_ordered_ = true;
  int shift_ = 0;  // the columns of a tile are 2^shift
  int64_t tile_ = 0;
  size_t cursor_ = 0;
};

// The entries of several short sparse rows, which are one tile.
class SparseRows {
 public:
  // Returns false if a row has an index beyond `columns` or invalid offsets.
  bool start(const Labels& labels, int64_t row, int rows, int columns);

  // Padding among the entries stands here, behind the tile.
  static constexpr int kNowhere = kTile;

  size_t size() const { return places_.size(); }
  const int32_t* places() const { return places_.data(); }  // in the tile; may repeat
  const double* values() const { return values_.empty() ? nullptr : values_.data(); }

 private:
  template <class Index>
  bool scan(const Index* indices, const Labels& labels, int64_t row, int rows, int columns);

  std::vector<int32_t> places_;
  std::vector<double> values_;  // infinity where invalid
};

// The entries of one sparse row as a set: sorted, without duplicates.
class SparseSet {
 public:
  // Returns false if the row has an index beyond `columns` or invalid offsets.
  bool start(const Labels& labels, int64_t row, int64_t columns);

  int64_t size() const { return static_cast<int64_t>(columns_.size()); }
  const int64_t* columns() const { return columns_.data(); }
  // Of duplicates the largest; infinity where invalid; nullptr = all 1.
  const double* values() const { return values_.empty() ? nullptr : values_.data(); }

 private:
  template <class Index>
  bool scan(const Index* indices, const Labels& labels, int64_t first, int64_t last,
            int64_t columns);
  void sort();

  std::vector<int64_t> columns_;
  std::vector<double> values_;
  bool is_sorted_ = true;
};

// Whether a row's column is set in dense bytes, in packed labels, or in no labels at all.
bool is_set(const Labels& labels, int64_t row, int64_t column);

// The labels of a sparse row in one tile as bits.
class MarkedBits {
 public:
  const uint32_t* mark(const SparseRow& row, const SparseRow::Range& entries) {
    // What the tile before had is taken back: few one by one.
    if (is_unknown_) std::fill_n(bits_, kWideTile / kWordBits, 0u);
    for (int i = 0; i < marks_; ++i) bits_[marked_[i]] = 0;
    const int64_t count = entries.last - entries.first;
    is_unknown_ = count > kFew;
    marks_ = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int place = row.place(entries.first[i]);
      bits_[place / kWordBits] |= 1u << (place % kWordBits);
      if (!is_unknown_) marked_[marks_++] = place / kWordBits;
    }
    return bits_;
  }

 private:
  static constexpr int kFew = 32;

  bool is_unknown_ = true;  // what the bits are
  int marks_ = 0;
  int marked_[kFew];  // words
  alignas(64) uint32_t bits_[kWideTile / kWordBits];
};

template <class Real>
class LabelReader {
 public:
  // `prefer_hard`: report soft-typed targets as hard where a tile holds only 0 and 1. Bits are only
  // for labels that have them.
  LabelReader(const Problem& problem, bool prefer_hard, Carrier carrier, Logits logits);

  // Columns [begin, end) of a row follow.
  void start_row(int64_t row, int64_t begin, int64_t end);

  // The most columns of the row that may be read at a time.
  int width() const { return row_is_valid_ ? width_ : kTile; }

  // All columns of `rows` rows follow, as one tile that begins at 0; hard targets and masks come as
  // bytes. Returns false if the labels of a row cannot be told: then they go row by row.
  bool start_rows(int64_t row, int rows);

  // Reads the next `count` <= width() columns, from left to right.
  void read(int64_t begin, int count, LabelTile<Real>& tile);

  // Bits of a tile become bytes.
  void expand(LabelTile<Real>& tile, int count);

 private:
  void read_target(int64_t begin, int count, LabelTile<Real>& tile);
  void read_sparse_targets(int count, LabelTile<Real>& tile);
  void read_dense_target(int64_t begin, int count, LabelTile<Real>& tile);
  void read_packed_target(int64_t begin, int count, LabelTile<Real>& tile);
  void read_mask(int64_t begin, int count, LabelTile<Real>& tile);
  const uint8_t* bytes_of(const Labels& labels, int64_t begin, int count, uint8_t* buffer) const;

  const Problem& problem_;
  const bool prefer_hard_;
  const Carrier carrier_;
  const int width_;
  int64_t row_ = 0;
  int rows_ = 0;  // of a tile of several rows; 0: tiles of one row
  bool row_is_valid_ = true;
  bool mask_is_valid_ = true;
  SparseRow target_row_;
  SparseRow mask_row_;
  SparseRows target_rows_;
  SparseRows mask_rows_;
  alignas(64) Real soft_[kTile + kPadding];
  alignas(64) uint8_t hard_[kTile + kPadding];
  alignas(64) uint8_t not_ignored_[kTile];
  alignas(64) uint8_t observed_[kTile + kPadding];
  MarkedBits hard_bits_;
  MarkedBits observed_bits_;
};

int64_t count_nonzero(const uint8_t* bytes, int count);
int64_t count_bits(const uint32_t* words, int count);

}  // namespace mlloss::cpu
