// Rows of logits and labels as threads that share a row see them: in windows, vector by vector.
//
// A row belongs to a part of a warp (LaneGroup) or to a block (BlockGroup). It is cut at the
// 16-byte boundaries of its logits, see vector.cuh; sparse labels become bits, or numbers, in
// shared memory, a window of positions at a time. What is read elsewhere is read by vectors that
// lie within the row, and element by element at its two ends.
#pragma once
#include <cstdint>

#include "cuda/sparse.cuh"
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

// The numbers of a vector.
template <class Scalar, class Real, int kCount>
__device__ __forceinline__ void unpack(const Vector<Scalar, kCount>& vector, Real (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = to_real(vector.element[i]);
}
// One instruction each: the high half of an fp32 number is a bf16 number.
__device__ __forceinline__ void unpack(const Vector<__nv_bfloat16, 8>& vector, float (&out)[8]) {
  const uint32_t words[4] = {vector.bits.x, vector.bits.y, vector.bits.z, vector.bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

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
    target_entries_ = mask_entries_ = {};
    is_valid_ = mask_is_valid_ = true;
    if (!exists) return;
    mask_is_valid_ = find_entries(problem_.mask, row, mask_entries_);
    is_valid_ = find_entries(problem_.target, row, target_entries_) && mask_is_valid_;
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
    window_logits_ = logits_ + column_;
    target_bits_ = bits_of_window(problem_.target);
    mask_bits_ = bits_of_window(problem_.mask);
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
    const Scalar* address = window_logits_ + place;
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
    // Only where there is something to write: `row` may be nullptr.
    if ((kInner || is_full(place)) && Logits::is_aligned(row + (column_ + place))) {
      values.store(row + (column_ + place));
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (place + i >= first_ && place + i < last_) row[column_ + place + i] = values.element[i];
    }
  }

  // Labels of kVectors vectors that are `stride` vectors apart. What is asked about their format is
  // asked once for all of them.
  template <bool kInner, int kVectors>
  __device__ __forceinline__ void labels(int vector, int stride,
                                         VectorOfLabels (&result)[kVectors]) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const Extent extent = extent_at<kInner>((vector + k * stride) * kCount);
      result[k].positive = 0;
      result[k].observed = ((1u << extent.last) - 1u) & ~((1u << extent.first) - 1u);
    }
    if (is_valid_) {
      read_target<kInner>(vector, stride, result);
    } else if constexpr (kSoft) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) result[k].target[i] = kNaN<Real>;
      }
    }
    if (problem_.mask.data == nullptr || !mask_is_valid_) return;
    uint32_t bits[kVectors];
    read_bits<kInner>(problem_.mask, mask_bits_, mask_bitmap_, vector, stride, bits);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) result[k].observed &= bits[k];
  }

  template <bool kInner>
  __device__ __forceinline__ VectorOfLabels labels(int vector) const {
    VectorOfLabels result[1];
    labels<kInner>(vector, 0, result);
    return result[0];
  }

 private:
  static constexpr uint32_t kAll = (1u << kCount) - 1u;

  __device__ __forceinline__ bool is_full(int place) const {
    return place >= first_ && place + kCount <= last_;
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
    const Marking mark{problem_.columns, column_, last_, group_.rank(), group_.width};
    bool bad_target = false, bad_mask = false;
    if (is_valid_) {
      bad_target = has_values
                       ? mark.template values<Real>(problem_.target, target_entries_, values_)
                       : mark.bits(problem_.target, target_entries_, target_bitmap_);
    }
    if (mask_is_valid_) bad_mask = mark.bits(problem_.mask, mask_entries_, mask_bitmap_);
    // These two are what makes the marks visible to all.
    group_.sync();
    const bool any_bad_mask = sparse_mask && group_.any(bad_mask);
    mask_is_valid_ = mask_is_valid_ && !any_bad_mask;
    is_valid_ = !group_.any(bad_target) && is_valid_ && !any_bad_mask;
  }

  __device__ __forceinline__ static uint32_t bitmap_at(const unsigned* bitmap, int place) {
    return (bitmap[static_cast<unsigned>(place) / 32] >> (place % 32)) & kAll;
  }

  template <bool kInner>
  __device__ __forceinline__ Extent extent_at(int place) const {
    if (kInner) return {0, kCount};
    const int before = first_ - place, inside = last_ - place;
    return {before > 0 ? before : 0, inside < kCount ? inside : kCount};
  }

  // Where the labels of the window begin: a bool per label, or the first of their bits. An offset
  // and not a pointer: the compiler knows then that what it leads to is in global memory.
  struct BitsOfWindow {
    int64_t offset = 0;  // bytes, or words
    int shift = 0;       // packed: the place of that bit in its word
  };

  __device__ __forceinline__ BitsOfWindow bits_of_window(const Labels& labels) const {
    const bool packed = labels.format == Format::kPacked;
    return {row_ * labels.row_stride + (packed ? column_ >> 5 : column_ * labels.column_stride),
            static_cast<int>(column_ & 31)};
  }

  // Bits of labels that are no numbers.
  template <bool kInner, int kVectors>
  __device__ __forceinline__ void read_bits(const Labels& labels, const BitsOfWindow& window,
                                            const unsigned* bitmap, int vector, int stride,
                                            uint32_t (&bits)[kVectors]) const {
    const auto for_each = [&](const auto& read) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) bits[k] = read((vector + k * stride) * kCount);
    };
    if (labels.format == Format::kSparse) {
      for_each([&](int place) { return bitmap_at(bitmap, place); });
    } else if (labels.format == Format::kPacked) {
      for_each([&](int place) {
        const Extent extent = extent_at<kInner>(place);
        // The first position of a window may lie before its row.
        const int begin = window.shift + place + extent.first;
        const auto* words =
            static_cast<const uint32_t*>(labels.data) + window.offset + (begin >> 5);
        const int shift = begin & 31, count = extent.last - extent.first;
        uint32_t value = words[0] >> shift;
        if (shift + count > 32) value |= words[1] << (32 - shift);
        return (value & ((1u << count) - 1u)) << extent.first;
      });
    } else if (kCount >= 4 && kInner && labels.column_stride == 1) {
      if constexpr (kCount >= 4) {
        for_each([&](int place) {
          return load_bool_words<kCount>(static_cast<const uint8_t*>(labels.data) + window.offset +
                                         place);
        });
      }
    } else {
      for_each([&](int place) {
        const auto* data =
            static_cast<const uint8_t*>(labels.data) + window.offset + place * labels.column_stride;
        if constexpr (kCount >= 4) {
          // Aligned words reach up to three bytes beyond the vector.
          if (labels.column_stride == 1 && place >= first_ + 3 && place + kCount + 3 <= last_) {
            return load_bool_words<kCount>(data);
          }
        }
        return load_bits<kCount>(data, labels.column_stride, extent_at<kInner>(place));
      });
    }
  }

  template <bool kInner, int kVectors>
  __device__ __forceinline__ void read_target(int vector, int stride,
                                              VectorOfLabels (&labels)[kVectors]) const {
    const Labels& target = problem_.target;
    if constexpr (kSoft) {
      if (target.format == Format::kSparse && target.values != nullptr) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const Real value = real_of(values_[(vector + k * stride) * kCount + i]);
            labels[k].target[i] = value <= 1 ? value : kNaN<Real>;
          }
        }
        return;
      }
      if (target.format == Format::kDense && target.element != Element::kBool) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          const int place = (vector + k * stride) * kCount;
          load_numbers(problem_, row_, column_ + place, extent_at<kInner>(place), labels[k]);
        }
        return;
      }
    }
    uint32_t bits[kVectors];
    read_bits<kInner>(target, target_bits_, target_bitmap_, vector, stride, bits);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      labels[k].positive = bits[k];
      if constexpr (kSoft) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          labels[k].target[i] = bits[k] & 1u << i ? Real(1) : Real(0);
        }
      }
    }
  }

  const Problem& problem_;
  const Group group_;
  unsigned* const target_bitmap_;
  unsigned* const mask_bitmap_;
  Bits* const values_;
  const Scalar* logits_ = nullptr;         // the row
  const Scalar* window_logits_ = nullptr;  // the window
  BitsOfWindow target_bits_, mask_bits_;
  int64_t row_ = 0;
  int64_t begin_ = 0;         // of the window, a position
  int64_t column_ = 0;        // of that position
  int shift_ = 0;             // position = column + shift
  int first_ = 0, last_ = 0;  // the part of the window that lies in the row
  bool exists_ = true;
  bool is_valid_ = true;
  bool mask_is_valid_ = true;
  Entries target_entries_, mask_entries_;
};

}  // namespace mlloss::cuda
