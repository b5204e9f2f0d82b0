#include "cpu/labels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/isa.h"

namespace mlloss::cpu {

// The loops over a tile. They are functions of their own because cloning for instruction sets works
// on functions; called once per tile, they cost nothing.
namespace loops {

template <class Real>
MLLOSS_INLINE bool validate_any(Real* targets, int count) {
  int soft = 0;
#pragma omp simd reduction(| : soft)
  for (int i = 0; i < count; ++i) {
    const Real y = targets[i];
    targets[i] = (y >= 0) & (y <= 1) ? y : std::numeric_limits<Real>::quiet_NaN();
    soft |= (y != 0) & (y != 1);
  }
  return soft == 0;
}

// Replaces targets outside [0, 1] by NaN; returns whether all are 0 or 1.
MLLOSS_CLONES bool validate(float* targets, int count) { return validate_any(targets, count); }
MLLOSS_CLONES bool validate(double* targets, int count) { return validate_any(targets, count); }

template <class Real>
MLLOSS_INLINE void compare_any(Real* targets, int count, double ignored, uint8_t* kept) {
  const Real value = static_cast<Real>(ignored);
  const bool ignores_nan = std::isnan(ignored);
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const Real y = targets[i];
    const bool ignore = ignores_nan ? y != y : y == value;
    kept[i] = ignore ? 0 : 1;
    targets[i] = ignore ? Real(0) : y;
  }
}

// kept = target is not `ignored`; ignored targets become 0.
MLLOSS_CLONES void compare(float* targets, int count, double ignored, uint8_t* kept) {
  compare_any(targets, count, ignored, kept);
}
MLLOSS_CLONES void compare(double* targets, int count, double ignored, uint8_t* kept) {
  compare_any(targets, count, ignored, kept);
}

template <class Real>
MLLOSS_INLINE void harden_any(const Real* targets, int count, uint8_t* hard) {
#pragma omp simd
  for (int i = 0; i < count; ++i) hard[i] = targets[i] != 0 ? 1 : 0;
}

MLLOSS_CLONES void harden(const float* targets, int count, uint8_t* hard) {
  harden_any(targets, count, hard);
}
MLLOSS_CLONES void harden(const double* targets, int count, uint8_t* hard) {
  harden_any(targets, count, hard);
}

MLLOSS_CLONES bool are_zero_or_one(const uint8_t* bytes, int count) {
  unsigned bits = 0;
#pragma omp simd reduction(| : bits)
  for (int i = 0; i < count; ++i) bits |= bytes[i];
  return bits <= 1;
}

MLLOSS_CLONES void both(const uint8_t* a, const uint8_t* b, int count, uint8_t* out) {
#pragma omp simd
  for (int i = 0; i < count; ++i) out[i] = (a[i] != 0) & (b[i] != 0);
}

// bytes[i] = bit i of the words, for whole words.
MLLOSS_CLONES void expand(const uint32_t* words, int count, uint8_t* bytes) {
  for (int w = 0; w < count; ++w) {
    const uint32_t word = words[w];
#pragma omp simd
    for (int i = 0; i < kWordBits; ++i) bytes[w * kWordBits + i] = word >> i & 1u;
  }
}

// The bits of short rows, which begin at a word each, as bytes one behind the other. `bytes` has
// room for a word's more.
MLLOSS_CLONES void expand_rows(const uint32_t* words, int64_t row_stride, int rows, int columns,
                               uint8_t* bytes) {
  for (int r = 0; r < rows; ++r) {
    for (int begin = 0; begin < columns; begin += kWordBits) {
      const uint32_t word = words[begin / kWordBits];
      // What is written beyond the row is overwritten by the next one.
#pragma omp simd
      for (int i = 0; i < kWordBits; ++i) bytes[begin + i] = word >> i & 1u;
    }
    words += row_stride;
    bytes += columns;
  }
}

template <class Index>
MLLOSS_INLINE bool find_places_any(const Index* indices, const int32_t* row_begins, int count,
                                   int columns, int32_t* places) {
  int beyond = 0;
#pragma omp simd reduction(| : beyond)
  for (int i = 0; i < count; ++i) {
    const Index column = indices[i];
    beyond |= column >= columns;
    places[i] = column < 0 ? SparseRows::kNowhere : row_begins[i] + static_cast<int32_t>(column);
  }
  return beyond == 0;
}

// Where entries of short rows stand in a tile; returns whether no index is beyond the columns.
MLLOSS_CLONES bool find_places(const int32_t* indices, const int32_t* row_begins, int count,
                               int columns, int32_t* places) {
  return find_places_any(indices, row_begins, count, columns, places);
}
MLLOSS_CLONES bool find_places(const int64_t* indices, const int32_t* row_begins, int count,
                               int columns, int32_t* places) {
  return find_places_any(indices, row_begins, count, columns, places);
}

MLLOSS_CLONES int count_bytes(const uint8_t* bytes, int count) {
  int total = 0;
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < count; ++i) total += bytes[i] != 0;
  return total;
}

}  // namespace loops

int64_t count_nonzero(const uint8_t* bytes, int count) { return loops::count_bytes(bytes, count); }

int64_t count_bits(const uint32_t* words, int count) {
  int64_t total = 0;
  for (int w = 0; w < count / kWordBits; ++w) total += std::popcount(words[w]);
  const int rest = count % kWordBits;
  if (rest > 0) total += std::popcount(words[count / kWordBits] & ((1u << rest) - 1));
  return total;
}

namespace {

bool is_sparse(const Labels& labels) {
  return labels.format == Format::kSparse || labels.format == Format::kObserved;
}

const uint32_t* words_of(const Labels& labels, int64_t row) {
  return static_cast<const uint32_t*>(labels.data) + row * labels.row_stride;
}

enum class Bits { kNone, kSome, kAll };

// What packed labels [begin, begin + count) of a row are. Tiles and pieces begin at multiples of a
// word.
Bits examine(const uint32_t* words, int count) {
  const int whole = count / kWordBits, rest = count % kWordBits;
  uint32_t any = 0, all = ~0u;
  for (int w = 0; w < whole; ++w) {
    any |= words[w];
    all &= words[w];
  }
  if (rest > 0) {
    // Bits beyond the row may be anything.
    const uint32_t inside = (1u << rest) - 1;
    any |= words[whole] & inside;
    all &= words[whole] | ~inside;
  }
  return any == 0 ? Bits::kNone : all == ~0u ? Bits::kAll : Bits::kSome;
}

int words_for(int count) { return (count + kWordBits - 1) / kWordBits; }

}  // namespace

bool is_set(const Labels& labels, int64_t row, int64_t column) {
  if (labels.data == nullptr) return true;
  if (labels.format == Format::kPacked) {
    return words_of(labels, row)[column / kWordBits] >> (column % kWordBits) & 1u;
  }
  return static_cast<const uint8_t*>(
             labels.data)[row * labels.row_stride + column * labels.column_stride] != 0;
}

namespace {

// The entries of a row; false if the offsets are no valid boundaries.
bool find_entries(const Labels& labels, int64_t row, int64_t* first, int64_t* last) {
  *first = index_at(labels.offsets, labels.element, row);
  *last = index_at(labels.offsets, labels.element, row + 1);
  return *first >= 0 && *first <= *last && *last <= labels.entries;
}

// Invalid values come out above every valid one, so that they win over duplicates; NaN when read.
double checked_value(double value) {
  return value >= 0 && value <= 1 ? value : std::numeric_limits<double>::infinity();
}

}  // namespace

template <class Index>
bool SparseRow::scan(const Index* indices, const Labels& labels, int64_t first, int64_t last,
                     int64_t begin, int64_t end, int64_t columns) {
  const bool has_values = labels.values != nullptr;
  columns_.resize(last - first);
  values_.resize(has_values ? last - first : 0);
  size_t count = 0;
  int64_t tile = 0;
  bool valid = true;
  for (int64_t run_begin = first; run_begin < last; run_begin += kTile) {
    const int run = static_cast<int>(std::min<int64_t>(kTile, last - run_begin));
    double values[kTile];
    if (has_values) load(labels.values, labels.values_element, run_begin, 1, run, values);
    for (int i = 0; i < run; ++i) {
      const int64_t column = indices[run_begin + i];
      valid &= column < columns;
      if (column < begin || column >= end) continue;
      columns_[count] = column - begin;
      if (has_values) values_[count] = checked_value(values[i]);
      ++count;
      is_ordered_ &= (column - begin) >> shift_ >= tile;
      tile = (column - begin) >> shift_;
    }
  }
  columns_.resize(count);
  if (has_values) values_.resize(count);
  return valid;
}

// Counting sort: however long the row, its ids are touched twice.
void SparseRow::order_by_tile(int64_t tiles) {
  places_.assign(tiles + 1, 0);
  for (const int64_t column : columns_) ++places_[(column >> shift_) + 1];
  for (int64_t tile = 0; tile < tiles; ++tile) places_[tile + 1] += places_[tile];
  ordered_columns_.resize(columns_.size());
  ordered_values_.resize(values_.size());
  for (size_t i = 0; i < columns_.size(); ++i) {
    const int64_t place = places_[columns_[i] >> shift_]++;
    ordered_columns_[place] = columns_[i];
    if (!values_.empty()) ordered_values_[place] = values_[i];
  }
  columns_.swap(ordered_columns_);
  values_.swap(ordered_values_);
}

bool SparseRow::start(const Labels& labels, int64_t row, int64_t begin, int64_t end,
                      int64_t columns, int width) {
  shift_ = std::countr_zero(static_cast<unsigned>(width));
  cursor_ = 0;
  tile_ = 0;
  is_ordered_ = true;
  int64_t first, last;
  if (!find_entries(labels, row, &first, &last)) return false;
  const bool valid =
      labels.element == Element::kInt32
          ? scan(static_cast<const int32_t*>(labels.data), labels, first, last, begin, end, columns)
          : scan(static_cast<const int64_t*>(labels.data), labels, first, last, begin, end,
                 columns);
  if (!is_ordered_) order_by_tile((end - begin + width - 1) / width);
  return valid;
}

SparseRow::Range SparseRow::next() {
  const size_t first = cursor_;
  const int64_t end = ++tile_ << shift_;
  while (cursor_ < columns_.size() && columns_[cursor_] < end) ++cursor_;
  return {columns_.data() + first, columns_.data() + cursor_,
          values_.empty() ? nullptr : values_.data() + first};
}

template <class Index>
bool SparseRows::scan(const Index* indices, const Labels& labels, int64_t row, int rows,
                      int columns) {
  const auto* offsets = static_cast<const Index*>(labels.offsets) + row;
  bool valid = offsets[0] >= 0 && offsets[rows] <= labels.entries;
  for (int r = 0; r < rows; ++r) valid &= offsets[r] <= offsets[r + 1];
  if (!valid) return false;
  const int64_t first = offsets[0], last = offsets[rows];
  const bool has_values = labels.values != nullptr;
  places_.resize(last - first);
  values_.resize(has_values ? last - first : 0);
  // A loop over each row's few entries would be left at a place that cannot be predicted. So first
  // where each entry's row begins, in whole vectors which the next row overwrites, then all
  // entries.
  constexpr int kVector = 16;
  int32_t row_begins[kTile + kVector];
  int r = 0;
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t end = std::min(begin + kTile, last);
    const int run = static_cast<int>(end - begin);
    while (r < rows && offsets[r] < end) {
      const int from = static_cast<int>(std::max<int64_t>(offsets[r], begin) - begin);
      const int to = static_cast<int>(std::min<int64_t>(offsets[r + 1], end) - begin);
      int i = from;
      do {
        std::fill_n(row_begins + i, kVector, r * columns);
        i += kVector;
      } while (i < to);
      if (offsets[r + 1] > end) break;
      ++r;
    }
    valid &= loops::find_places(indices + begin, row_begins, run, columns,
                                places_.data() + (begin - first));
    if (has_values) {
      double* values = values_.data() + (begin - first);
      load(labels.values, labels.values_element, begin, 1, run, values);
      for (int i = 0; i < run; ++i) values[i] = checked_value(values[i]);
    }
  }
  return valid;
}

bool SparseRows::start(const Labels& labels, int64_t row, int rows, int columns) {
  return labels.element == Element::kInt32
             ? scan(static_cast<const int32_t*>(labels.data), labels, row, rows, columns)
             : scan(static_cast<const int64_t*>(labels.data), labels, row, rows, columns);
}

template <class Index>
bool SparseSet::scan(const Index* indices, const Labels& labels, int64_t first, int64_t last,
                     int64_t columns) {
  const bool has_values = labels.values != nullptr;
  columns_.resize(last - first);
  values_.resize(has_values ? last - first : 0);
  size_t count = 0;
  int64_t previous = -1;
  bool valid = true;
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int run = static_cast<int>(std::min<int64_t>(kTile, last - begin));
    double values[kTile];
    if (has_values) load(labels.values, labels.values_element, begin, 1, run, values);
    for (int i = 0; i < run; ++i) {
      const int64_t column = indices[begin + i];
      valid &= column < columns;
      if (column < 0) continue;
      is_sorted_ &= column > previous;
      previous = column;
      columns_[count] = column;
      if (has_values) values_[count] = checked_value(values[i]);
      ++count;
    }
  }
  columns_.resize(count);
  if (has_values) values_.resize(count);
  return valid;
}

void SparseSet::sort() {
  if (values_.empty()) {
    std::sort(columns_.begin(), columns_.end());
    columns_.erase(std::unique(columns_.begin(), columns_.end()), columns_.end());
    return;
  }
  std::vector<std::pair<int64_t, double>> entries(columns_.size());
  for (size_t i = 0; i < entries.size(); ++i) entries[i] = {columns_[i], -values_[i]};
  // By column; of duplicates the largest value comes first, and stays.
  std::sort(entries.begin(), entries.end());
  size_t count = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (i > 0 && entries[i].first == entries[i - 1].first) continue;
    columns_[count] = entries[i].first;
    values_[count] = -entries[i].second;
    ++count;
  }
  columns_.resize(count);
  values_.resize(count);
}

bool SparseSet::start(const Labels& labels, int64_t row, int64_t columns) {
  columns_.clear();
  values_.clear();
  is_sorted_ = true;
  int64_t first, last;
  if (!find_entries(labels, row, &first, &last)) return false;
  const bool valid =
      labels.element == Element::kInt32
          ? scan(static_cast<const int32_t*>(labels.data), labels, first, last, columns)
          : scan(static_cast<const int64_t*>(labels.data), labels, first, last, columns);
  if (valid && !is_sorted_) sort();
  return valid;
}

namespace {

// Whether labels go to the loops as they are stored, or as bits.
bool need_no_decoding(const Labels& labels, Carrier carrier) {
  if (labels.data == nullptr || carrier == Carrier::kBits) return true;
  return labels.format == Format::kDense && labels.element == Element::kBool &&
         labels.column_stride == 1;
}

}  // namespace

template <class Real>
LabelReader<Real>::LabelReader(const Problem& problem, bool prefer_hard, Carrier carrier,
                               Logits logits)
    : problem_(problem),
      prefer_hard_(prefer_hard),
      carrier_(carrier),
      width_(logits == Logits::kWide && need_no_decoding(problem.target, carrier) &&
                     need_no_decoding(problem.mask, carrier)
                 ? kWideTile
                 : kTile) {}

template <class Real>
void LabelReader<Real>::start_row(int64_t row, int64_t begin, int64_t end) {
  row_ = row;
  rows_ = 0;
  const auto start = [&](const Labels& labels, SparseRow& entries, int width) {
    return !is_sparse(labels) || entries.start(labels, row, begin, end, problem_.columns, width);
  };
  const bool target_is_valid = start(problem_.target, target_row_, width_);
  mask_is_valid_ = start(problem_.mask, mask_row_, width_);
  row_is_valid_ = target_is_valid && mask_is_valid_;
  // What cannot be told goes by narrow tiles.
  if (mask_is_valid_ && width() < width_) start(problem_.mask, mask_row_, width());
}

template <class Real>
bool LabelReader<Real>::start_rows(int64_t row, int rows) {
  row_ = row;
  rows_ = rows;
  row_is_valid_ = mask_is_valid_ = true;
  return (!is_sparse(problem_.target) ||
          target_rows_.start(problem_.target, row, rows, static_cast<int>(problem_.columns))) &&
         (!is_sparse(problem_.mask) ||
          mask_rows_.start(problem_.mask, row, rows, static_cast<int>(problem_.columns)));
}

template <class Real>
void LabelReader<Real>::read(int64_t begin, int count, LabelTile<Real>& tile) {
  tile = LabelTile<Real>();
  if (row_is_valid_) {
    read_target(begin, count, tile);
  } else {
    // Labels that cannot be told make every element of the row NaN.
    std::fill_n(soft_, count, std::numeric_limits<Real>::quiet_NaN());
    tile.kind = TargetKind::kSoft;
    tile.soft = soft_;
  }
  if (mask_is_valid_) read_mask(begin, count, tile);
}

template <class Real>
void LabelReader<Real>::read_target(int64_t begin, int count, LabelTile<Real>& tile) {
  if (problem_.target.format == Format::kDense) {
    read_dense_target(begin, count, tile);
    return;
  }
  if (problem_.target.format == Format::kPacked) {
    read_packed_target(begin, count, tile);
    return;
  }
  if (rows_ > 0) {
    read_sparse_targets(count, tile);
    return;
  }
  const SparseRow::Range entries = target_row_.next();
  const auto [first, last, values] = entries;
  if (first == last) return;
  if (carrier_ == Carrier::kBits) {
    tile.kind = TargetKind::kHard;
    tile.hard_bits = hard_bits_.mark(target_row_, entries);
  } else if (values == nullptr) {
    std::memset(hard_, 0, count);
    for (auto column = first; column != last; ++column) hard_[target_row_.place(*column)] = 1;
    tile.kind = TargetKind::kHard;
    tile.hard = hard_;
  } else {
    std::fill_n(soft_, count, Real(0));
    // Of duplicates the largest value counts.
    for (auto column = first; column != last; ++column) {
      Real& value = soft_[target_row_.place(*column)];
      value = std::max(value, static_cast<Real>(values[column - first]));
    }
    loops::validate(soft_, count);
    tile.kind = TargetKind::kSoft;
    tile.soft = soft_;
  }
}

// The same of several rows.
template <class Real>
void LabelReader<Real>::read_sparse_targets(int count, LabelTile<Real>& tile) {
  const int32_t* places = target_rows_.places();
  const double* values = target_rows_.values();
  const size_t size = target_rows_.size();
  if (size == 0) return;
  if (values == nullptr) {
    std::memset(hard_, 0, count);
    for (size_t i = 0; i < size; ++i) hard_[places[i]] = 1;
    tile.kind = TargetKind::kHard;
    tile.hard = hard_;
    return;
  }
  std::fill_n(soft_, count, Real(0));
  for (size_t i = 0; i < size; ++i) {
    soft_[places[i]] = std::max(soft_[places[i]], static_cast<Real>(values[i]));
  }
  loops::validate(soft_, count);
  tile.kind = TargetKind::kSoft;
  tile.soft = soft_;
}

template <class Real>
void LabelReader<Real>::read_packed_target(int64_t begin, int count, LabelTile<Real>& tile) {
  const uint32_t* words = words_of(problem_.target, row_) + begin / kWordBits;
  if (rows_ > 0) {
    loops::expand_rows(words, problem_.target.row_stride, rows_, count / rows_, hard_);
    tile.kind = TargetKind::kHard;
    tile.hard = hard_;
    return;
  }
  if (carrier_ == Carrier::kBits) {
    tile.kind = TargetKind::kHard;
    tile.hard_bits = words;
  } else if (examine(words, count) != Bits::kNone) {
    loops::expand(words, words_for(count), hard_);
    tile.kind = TargetKind::kHard;
    tile.hard = hard_;
  }
}

template <class Real>
void LabelReader<Real>::read_dense_target(int64_t begin, int count, LabelTile<Real>& tile) {
  const Labels& target = problem_.target;
  const int64_t offset = row_ * target.row_stride + begin * target.column_stride;
  const bool is_byte = target.element == Element::kBool || target.element == Element::kUint8;
  if (is_byte && target.column_stride == 1) {
    const uint8_t* bytes = bytes_of(target, begin, count, hard_);
    if (target.element == Element::kBool || loops::are_zero_or_one(bytes, count)) {
      tile.kind = TargetKind::kHard;
      tile.hard = bytes;
      return;
    }
  }
  if (rows_ > 0) {
    load_rows(target.data, target.element, offset, target.row_stride, target.column_stride, rows_,
              count / rows_, soft_);
  } else {
    load(target.data, target.element, offset, target.column_stride, count, soft_);
  }
  if (problem_.has_ignored) {
    loops::compare(soft_, count, problem_.ignored, not_ignored_);
    tile.observed = not_ignored_;
  }
  const bool is_hard = loops::validate(soft_, count);
  tile.kind = TargetKind::kSoft;
  tile.soft = soft_;
  if (is_hard && prefer_hard_) {
    loops::harden(soft_, count, hard_);
    tile.kind = TargetKind::kHard;
    tile.hard = hard_;
  }
}

// The bytes of a tile: as they lie there, or one behind the other in `buffer`.
template <class Real>
const uint8_t* LabelReader<Real>::bytes_of(const Labels& labels, int64_t begin, int count,
                                           uint8_t* buffer) const {
  const int64_t stride = labels.column_stride;
  const auto* source =
      static_cast<const uint8_t*>(labels.data) + row_ * labels.row_stride + begin * stride;
  if (stride == 1 && (rows_ <= 1 || labels.row_stride == problem_.columns)) return source;
  const int rows = std::max(rows_, 1), columns = count / rows;
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < columns; ++i) buffer[r * columns + i] = source[i * stride];
    source += labels.row_stride;
  }
  return buffer;
}

template <class Real>
void LabelReader<Real>::read_mask(int64_t begin, int count, LabelTile<Real>& tile) {
  const Labels& mask = problem_.mask;
  if (mask.data == nullptr) return;
  // The targets of an invalid row are numbers, beside which the loops take bytes.
  const bool as_bits = carrier_ == Carrier::kBits && row_is_valid_ && rows_ == 0;
  const uint8_t* bytes = observed_;
  if (mask.format == Format::kSparse && rows_ > 0) {
    const int32_t* places = mask_rows_.places();
    tile.empty = mask_rows_.size() == 0;
    std::memset(observed_, 0, count);
    for (size_t i = 0; i < mask_rows_.size(); ++i) observed_[places[i]] = 1;
  } else if (mask.format == Format::kSparse) {
    const SparseRow::Range entries = mask_row_.next();
    tile.empty = entries.first == entries.last;
    if (as_bits) {
      tile.observed_bits = observed_bits_.mark(mask_row_, entries);
      return;
    }
    std::memset(observed_, 0, count);
    for (auto column = entries.first; column != entries.last; ++column) {
      observed_[mask_row_.place(*column)] = 1;
    }
  } else if (mask.format == Format::kPacked) {
    const uint32_t* words = words_of(mask, row_) + begin / kWordBits;
    if (rows_ > 0) {
      loops::expand_rows(words, mask.row_stride, rows_, count / rows_, observed_);
    } else if (as_bits) {
      tile.observed_bits = words;
      return;
    } else {
      const Bits bits = examine(words, count);
      if (bits == Bits::kAll) return;
      tile.empty = bits == Bits::kNone;
      loops::expand(words, words_for(count), observed_);
    }
  } else {
    bytes = bytes_of(mask, begin, count, observed_);
  }
  if (tile.observed != nullptr) {
    loops::both(tile.observed, bytes, count, observed_);
    bytes = observed_;
  }
  tile.observed = bytes;
}

template <class Real>
void LabelReader<Real>::expand(LabelTile<Real>& tile, int count) {
  if (tile.hard_bits != nullptr) {
    loops::expand(tile.hard_bits, words_for(count), hard_);
    tile.hard = hard_;
    tile.hard_bits = nullptr;
  }
  if (tile.observed_bits != nullptr) {
    loops::expand(tile.observed_bits, words_for(count), observed_);
    tile.observed = observed_;
    tile.observed_bits = nullptr;
  }
}

template class LabelReader<float>;
template class LabelReader<double>;

}  // namespace mlloss::cpu
