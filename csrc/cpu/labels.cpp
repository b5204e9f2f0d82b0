#include "cpu/labels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

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

MLLOSS_CLONES int count_bytes(const uint8_t* bytes, int count) {
  int total = 0;
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < count; ++i) total += bytes[i] != 0;
  return total;
}

}  // namespace loops

int64_t count_nonzero(const uint8_t* bytes, int count) { return loops::count_bytes(bytes, count); }

bool SparseRow::start(const Labels& labels, int64_t row, int64_t begin, int64_t end,
                      int64_t columns) {
  entries_.clear();
  cursor_ = 0;
  const int64_t first = index_at(labels.offsets, labels.element, row);
  const int64_t last = index_at(labels.offsets, labels.element, row + 1);
  if (first < 0 || first > last || last > labels.entries) return false;
  bool valid = true;
  for (int64_t i = first; i < last; ++i) {
    const int64_t column = index_at(labels.data, labels.element, i);
    valid &= column < columns;
    if (column < begin || column >= end) continue;
    double value = 1;
    if (labels.values != nullptr) {
      load(labels.values, labels.values_element, i, 1, 1, &value);
      // Above every valid value, so that it wins over duplicates; NaN when it is read.
      if (!(value >= 0 && value <= 1)) value = std::numeric_limits<double>::infinity();
    }
    entries_.push_back({column, value});
  }
  if (!valid) return false;
  const auto before = [](const Entry& a, const Entry& b) {
    return a.column != b.column ? a.column < b.column : a.value > b.value;
  };
  if (!std::is_sorted(entries_.begin(), entries_.end(), before)) {
    std::sort(entries_.begin(), entries_.end(), before);
  }
  // Of duplicates the first stays: the largest value.
  const auto same = [](const Entry& a, const Entry& b) { return a.column == b.column; };
  entries_.erase(std::unique(entries_.begin(), entries_.end(), same), entries_.end());
  return true;
}

SparseRow::Range SparseRow::next(int64_t begin, int count) {
  while (cursor_ < entries_.size() && entries_[cursor_].column < begin) ++cursor_;
  const size_t first = cursor_;
  while (cursor_ < entries_.size() && entries_[cursor_].column < begin + count) ++cursor_;
  return {entries_.data() + first, entries_.data() + cursor_};
}

template <class Real>
void LabelReader<Real>::start_row(int64_t row, int64_t begin, int64_t end) {
  row_ = row;
  const bool target_is_valid =
      problem_.target.format != Format::kSparse ||
      target_row_.start(problem_.target, row, begin, end, problem_.columns);
  mask_is_valid_ = problem_.mask.format != Format::kSparse ||
                   mask_row_.start(problem_.mask, row, begin, end, problem_.columns);
  row_is_valid_ = target_is_valid && mask_is_valid_;
}

template <class Real>
LabelTile<Real> LabelReader<Real>::tile(int64_t begin, int count) {
  LabelTile<Real> tile;
  if (row_is_valid_) {
    read_target(begin, count, tile);
  } else {
    // Labels that cannot be told make every element of the row NaN.
    std::fill_n(soft_, count, std::numeric_limits<Real>::quiet_NaN());
    tile.kind = TargetKind::kSoft;
    tile.soft = soft_;
  }
  if (mask_is_valid_) read_mask(begin, count, tile);
  return tile;
}

template <class Real>
void LabelReader<Real>::read_target(int64_t begin, int count, LabelTile<Real>& tile) {
  if (problem_.target.format == Format::kDense) {
    read_dense_target(begin, count, tile);
    return;
  }
  const auto [first, last] = target_row_.next(begin, count);
  if (first == last) return;
  if (problem_.target.values == nullptr) {
    std::memset(hard_, 0, count);
    for (auto entry = first; entry != last; ++entry) hard_[entry->column - begin] = 1;
    tile.kind = TargetKind::kHard;
    tile.hard = hard_;
  } else {
    std::fill_n(soft_, count, Real(0));
    for (auto entry = first; entry != last; ++entry) {
      soft_[entry->column - begin] = static_cast<Real>(entry->value);
    }
    loops::validate(soft_, count);
    tile.kind = TargetKind::kSoft;
    tile.soft = soft_;
  }
}

template <class Real>
void LabelReader<Real>::read_dense_target(int64_t begin, int count, LabelTile<Real>& tile) {
  const Labels& target = problem_.target;
  const int64_t offset = row_ * target.row_stride + begin * target.column_stride;
  const bool is_byte = target.element == Element::kBool || target.element == Element::kUint8;
  if (is_byte && target.column_stride == 1) {
    const uint8_t* bytes = static_cast<const uint8_t*>(target.data) + offset;
    if (target.element == Element::kBool || loops::are_zero_or_one(bytes, count)) {
      tile.kind = TargetKind::kHard;
      tile.hard = bytes;
      return;
    }
  }
  load(target.data, target.element, offset, target.column_stride, count, soft_);
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

template <class Real>
void LabelReader<Real>::read_mask(int64_t begin, int count, LabelTile<Real>& tile) {
  const Labels& mask = problem_.mask;
  if (mask.data == nullptr) return;
  const uint8_t* bytes = observed_;
  if (mask.format == Format::kSparse) {
    const auto [first, last] = mask_row_.next(begin, count);
    tile.empty = first == last;
    std::memset(observed_, 0, count);
    for (auto entry = first; entry != last; ++entry) observed_[entry->column - begin] = 1;
  } else {
    const uint8_t* source = static_cast<const uint8_t*>(mask.data) + row_ * mask.row_stride +
                            begin * mask.column_stride;
    if (mask.column_stride == 1) {
      bytes = source;
    } else {
      for (int i = 0; i < count; ++i) observed_[i] = source[i * mask.column_stride];
    }
  }
  if (tile.observed != nullptr) {
    loops::both(tile.observed, bytes, count, observed_);
    bytes = observed_;
  }
  tile.observed = bytes;
}

template class LabelReader<float>;
template class LabelReader<double>;

}  // namespace mlloss::cpu
