// Rows of logits and labels as threads that share a row see them: in windows, vector by vector.
//
// A row belongs to a part of a warp (LaneGroup) or to a block (BlockGroup). It is cut at the
// 16-byte boundaries of its logits, see vector.cuh; sparse labels become bits, or numbers, in
// shared memory, a window of positions at a time. What is read elsewhere is read by vectors that
// lie within the row, and element by element at its two ends.
#pragma once
#include <cstdint>

#include "cuda/tiles.cuh"
#include "cuda/vector.cuh"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// `width` lanes of a warp, a power of two. All lanes of the warp call the collective functions.
struct LaneGroup {
  int width;

  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x) % width; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ bool any(bool predicate) const {
    const unsigned lanes = __ballot_sync(kWholeWarp, predicate);
    const int first = static_cast<int>(threadIdx.x) % 32 / width * width;
    return (lanes >> first & (kWholeWarp >> (32 - width))) != 0;
  }
};

struct BlockGroup {
  int width;  // threads

  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ bool any(bool predicate) const { return __syncthreads_or(predicate); }
};

// Bit i of the result: byte i is not 0.
__device__ __forceinline__ uint32_t nonzero_bytes(uint32_t bytes) {
  const uint32_t high = (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
  // The bits 0, 8, 16, 24 side by side: their 16 products fall on different bits.
  return (high >> 7) * 0x01020408u >> 24;
}

// Bit i of the result: data[i] is not 0. Reads the aligned words that hold the bytes.
template <int kCount>
__device__ __forceinline__ uint32_t load_bool_words(const uint8_t* data) {
  static_assert(kCount == 4 || kCount == 8);
  const int odd = static_cast<int>(reinterpret_cast<uintptr_t>(data) % 4);
  if constexpr (kCount == 8) {
    if (reinterpret_cast<uintptr_t>(data) % 8 == 0) {
      const uint2 words = *reinterpret_cast<const uint2*>(data);
      return nonzero_bytes(words.x) | nonzero_bytes(words.y) << 4;
    }
  }
  const auto* words = reinterpret_cast<const uint32_t*>(data - odd);
  uint32_t bits = 0;
  uint32_t low = words[0];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const uint32_t high = odd == 0 && i == kCount / 4 - 1 ? 0 : words[i + 1];
    const auto both = static_cast<uint64_t>(high) << 32 | low;
    bits |= nonzero_bytes(static_cast<uint32_t>(both >> (8 * odd))) << (4 * i);
    low = high;
  }
  return bits;
}

// Positions whose sparse labels are in shared memory at a time.
template <bool kSoft>
constexpr int kWindow = kSoft ? 4096 : 65536;

template <class Scalar, bool kSoft, class Group>
class RowWindow {
 public:
  using Real = typename Arithmetic<Scalar>::Real;
  static constexpr int kCount = kWidth<Scalar>;
  using Bits = typename SharedLabels<Real, kSoft>::Bits;
  using Logits = Vector<Scalar, kCount>;
  using VectorOfLabels = VectorLabels<Real, kCount>;

  // The arrays are the group's own in shared memory, as long as a window: of bits, and of values
  // where targets are soft.
  __device__ __forceinline__ RowWindow(const Problem& problem, Group group, unsigned* target_bitmap,
                                       unsigned* mask_bitmap, Bits* values)
      : problem_(problem),
        group_(group),
        target_bitmap_(target_bitmap),
        mask_bitmap_(mask_bitmap),
        values_(values) {}

  // Collective, as start_window is. Where a group has no row left, `exists` is false.
  __device__ __forceinline__ void start_row(int64_t row, bool exists = true) {
    row_ = row;
    exists_ = exists;
    logits_ = static_cast<const Scalar*>(problem_.logits) + row * problem_.row_stride;
    shift_ =
        static_cast<int>(reinterpret_cast<uintptr_t>(logits_) / sizeof(Scalar) % unsigned{kCount});
    mask_is_valid_ = find_entries(problem_.mask, mask_first_, mask_last_);
    is_valid_ = find_entries(problem_.target, target_first_, target_last_) && mask_is_valid_;
  }

  // Positions of the row: columns + shift.
  __device__ __forceinline__ int64_t positions() const { return problem_.columns + shift_; }

  // The window [begin, end) of positions; `begin` is a multiple of kCount.
  __device__ __forceinline__ void start_window(int64_t begin, int64_t end) {
    begin_ = begin;
    column_ = begin - shift_;
    const int64_t row_end = problem_.columns + shift_;
    first_ = begin == 0 ? shift_ : 0;
    last_ = !exists_ ? 0 : static_cast<int>((end < row_end ? end : row_end) - begin);
    collect_entries();
  }

  // False if the labels of this row cannot be told; its observed elements are NaN then. Every
  // window looks at all entries of the row, so all windows agree.
  __device__ __forceinline__ bool is_valid() const { return is_valid_; }

  __device__ __forceinline__ int vectors() const { return (last_ + kCount - 1) / kCount; }

  // Vectors [first_inner, last_inner) lie within the row, and so do the vectors beside them.
  __device__ __forceinline__ int first_inner() const { return 1; }
  __device__ __forceinline__ int last_inner() const { return last_ / kCount - 1; }

  // Logits of a vector, 0 outside of the row.
  template <bool kInner>
  __device__ __forceinline__ Logits logits(int vector) const {
    Logits result;
    const int place = vector * kCount;
    const Scalar* address = logits_ + column_ + place;
    if (kInner || is_full(place)) {
      result.load(address);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool inside = place + i >= first_ && place + i < last_;
        from_real(inside ? to_real(address[i]) : Real(0), &result.element[i]);
      }
    }
    return result;
  }

  // `row` is where the row begins in the result.
  template <bool kInner>
  __device__ __forceinline__ void store(int vector, const Logits& values, Scalar* row) const {
    const int place = vector * kCount;
    Scalar* address = row + column_ + place;
    if ((kInner || is_full(place)) && Logits::is_aligned(address)) {
      values.store(address);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (place + i >= first_ && place + i < last_) address[i] = values.element[i];
      }
    }
  }

  template <bool kInner>
  __device__ __forceinline__ VectorOfLabels labels(int vector) const {
    VectorOfLabels result;
    const int place = vector * kCount;
    const int before = first_ - place, inside = last_ - place;
    const Extent extent = kInner ? Extent{0, kCount}
                                 : Extent{before > 0 ? before : 0, inside < kCount ? inside : kCount};
    result.positive = 0;
    result.observed = ((1u << extent.last) - 1u) & ~((1u << extent.first) - 1u);
    if (is_valid_) {
      read_target<kInner>(place, extent, result);
    } else if constexpr (kSoft) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) result.target[i] = kNaN<Real>;
    }
    const Labels& mask = problem_.mask;
    if (mask.data != nullptr && mask_is_valid_) {
      result.observed &= mask.format == Format::kSparse ? bitmap_at(mask_bitmap_, place)
                                                        : dense_bits<kInner>(mask, place, extent);
    }
    return result;
  }

 private:
  static constexpr unsigned kBadTarget = 1, kBadMask = 2;
  static constexpr uint32_t kAll = (1u << kCount) - 1u;

  __device__ __forceinline__ bool is_full(int place) const {
    return place >= first_ && place + kCount <= last_;
  }

  // The entries of this row; false if the offsets are no valid boundaries.
  __device__ __forceinline__ bool find_entries(const Labels& labels, int64_t& first,
                                               int64_t& last) const {
    first = last = 0;
    if (labels.format != Format::kSparse || !exists_) return true;
    first = index_at(labels.offsets, labels.element, row_);
    last = index_at(labels.offsets, labels.element, row_ + 1);
    return first >= 0 && first <= last && last <= labels.entries;
  }

  __device__ __forceinline__ void collect_entries() {
    const bool sparse_mask = problem_.mask.format == Format::kSparse;
    if (problem_.target.format != Format::kSparse && !sparse_mask) return;
    const bool has_values = kSoft && problem_.target.values != nullptr;
    group_.sync();  // the window before has been read
    const int words = (vectors() * kCount + 31) / 32;
    for (int i = group_.rank(); i < words; i += group_.width) {
      target_bitmap_[i] = 0;
      if (sparse_mask) mask_bitmap_[i] = 0;
    }
    if (has_values) {
      for (int i = group_.rank(); i < vectors() * kCount; i += group_.width) values_[i] = 0;
    }
    group_.sync();
    bool bad_target = false, bad_mask = false;
    if (is_valid_) {
      bad_target = has_values
                       ? mark_values()
                       : mark_bits(problem_.target, target_first_, target_last_, target_bitmap_);
    }
    if (mask_is_valid_) {
      bad_mask = mark_bits(problem_.mask, mask_first_, mask_last_, mask_bitmap_);
    }
    // These two are what makes the marks visible to all.
    group_.sync();
    const bool any_bad_mask = sparse_mask && group_.any(bad_mask);
    mask_is_valid_ = mask_is_valid_ && !any_bad_mask;
    is_valid_ = !group_.any(bad_target) && is_valid_ && !any_bad_mask;
  }

  // Sets the bits of the entries within this window; returns whether an index is out of range.
  __device__ __forceinline__ bool mark_bits(const Labels& labels, int64_t first, int64_t last,
                                            unsigned* bitmap) const {
    bool out_of_range = false;
    for (int64_t i = first + group_.rank(); i < last; i += group_.width) {
      const int64_t column = index_at(labels.data, labels.element, i);
      const int64_t place = column - column_;
      out_of_range |= column >= problem_.columns;
      if (column >= 0 && column < problem_.columns && place >= 0 && place < last_) {
        atomicOr(&bitmap[place / 32], 1u << (place % 32));
      }
    }
    return out_of_range;
  }

  // The same for soft targets. Of duplicates the largest wins; the bits of numbers that are not
  // negative are ordered as the numbers are. Invalid values become infinite, NaN when they are
  // read.
  __device__ __forceinline__ bool mark_values() const {
    const Labels& target = problem_.target;
    bool out_of_range = false;
    for (int64_t i = target_first_ + group_.rank(); i < target_last_; i += group_.width) {
      const int64_t column = index_at(target.data, target.element, i);
      const int64_t place = column - column_;
      out_of_range |= column >= problem_.columns;
      if (column >= 0 && column < problem_.columns && place >= 0 && place < last_) {
        const Real value = load_one<Real>(target.values, target.values_element, i);
        atomicMax(&values_[place],
                  bits_of(value >= 0 && value <= 1 ? value + Real(0) : kInfinity<Real>));
      }
    }
    return out_of_range;
  }

  __device__ __forceinline__ static uint32_t bitmap_at(const unsigned* bitmap, int place) {
    return (bitmap[static_cast<unsigned>(place) / 32] >> (place % 32)) & kAll;
  }

  // Packed or bool labels.
  template <bool kInner>
  __device__ __forceinline__ uint32_t dense_bits(const Labels& labels, int place,
                                                 Extent extent) const {
    if (labels.format == Format::kPacked) {
      const auto* words = static_cast<const uint32_t*>(labels.data) + row_ * labels.row_stride;
      return load_packed<kCount>(words, column_ + place, extent);
    }
    const auto* bytes = static_cast<const uint8_t*>(labels.data) + row_ * labels.row_stride;
    if constexpr (kCount >= 4) {
      // Aligned words reach up to three bytes beyond the vector.
      const bool inner =
          kInner || (place >= first_ + 3 && place + kCount + 3 <= last_);
      if (inner && labels.column_stride == 1) {
        return load_bool_words<kCount>(bytes + column_ + place);
      }
    }
    return load_bits<kCount>(bytes + (column_ + place) * labels.column_stride, labels.column_stride,
                             extent);
  }

  template <bool kInner>
  __device__ __forceinline__ void read_target(int place, Extent extent,
                                              VectorOfLabels& labels) const {
    const Labels& target = problem_.target;
    if (target.format == Format::kSparse) {
      if (kSoft && target.values != nullptr) {
        if constexpr (kSoft) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const Real value = real_of(values_[place + i]);
            labels.target[i] = value <= 1 ? value : kNaN<Real>;
          }
        }
        return;
      }
      labels.positive = bitmap_at(target_bitmap_, place);
    } else if (!kSoft || target.format == Format::kPacked || target.element == Element::kBool) {
      labels.positive = dense_bits<kInner>(target, place, extent);
    } else if constexpr (kSoft) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) labels.target[i] = 0;
      load_any(target.data, target.element,
               row_ * target.row_stride + (column_ + place) * target.column_stride,
               target.column_stride, extent, labels.target);
      const bool ignores_nan = problem_.ignored != problem_.ignored;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const Real y = labels.target[i];
        if (problem_.has_ignored && (ignores_nan ? y != y : y == Real(problem_.ignored))) {
          labels.observed &= ~(1u << i);
        }
        labels.target[i] = y >= 0 && y <= 1 ? y : kNaN<Real>;
      }
      return;
    }
    if constexpr (kSoft) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        labels.target[i] = labels.positive >> i & 1u ? Real(1) : Real(0);
      }
    }
  }

  const Problem& problem_;
  const Group group_;
  unsigned* const target_bitmap_;
  unsigned* const mask_bitmap_;
  Bits* const values_;
  const Scalar* logits_ = nullptr;  // the row
  int64_t row_ = 0;
  int64_t begin_ = 0;       // of the window, a position
  int64_t column_ = 0;      // of that position
  int shift_ = 0;           // position = column + shift
  int first_ = 0, last_ = 0;  // the part of the window that lies in the row
  bool exists_ = true;
  bool is_valid_ = true;
  bool mask_is_valid_ = true;
  int64_t target_first_ = 0, target_last_ = 0;
  int64_t mask_first_ = 0, mask_last_ = 0;
};

}  // namespace mlloss::cuda
