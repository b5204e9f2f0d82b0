// How a block walks over a matrix, and how it gets the targets and masks of what it sees.
//
// Rows are split into segments of some tiles; a segment of a row is the unit of work of a block.
// The split depends on the shape alone, so results do not depend on the GPU.
#pragma once
#include <cstdint>

#include "cuda/sparse.cuh"
#include "cuda/vector.cuh"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss::cuda {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;  // elements of a tile that a thread handles
constexpr int kTileWidth = kThreads * kPerThread;
// A segment is long enough to make its reduction cheap where there is plenty of work, shorter where
// there is not, so that all multiprocessors get some, and long enough that a row has few of them.
constexpr int kMaxTilesPerSegment = 16;
constexpr int64_t kWantedUnits = 4096;
constexpr int64_t kMaxSegmentsPerRow = 64;
// Sparse labels of so many tiles become bitmaps at a time: the block waits for its threads once per
// window, and the ids of a row are read once per window.
constexpr int kBitmapTiles = 8;
constexpr int kBitmapWindow = kBitmapTiles * kTileWidth;
constexpr int kBitmapWords = kBitmapWindow / 32;
// Asking for no more than this leaves every thread up to 128 registers (fp64: 255), so that nothing
// is spilled.
template <class Real>
constexpr int kBlocksPerMultiprocessor = sizeof(Real) == 8 ? 1 : 2;

struct Units {
  int64_t width;    // positions in a segment
  int64_t per_row;  // segments of a row
  int64_t count;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Units units_of(const Problem& problem) {
  const int64_t size = problem.element == Element::kDouble  ? 8
                       : problem.element == Element::kFloat ? 4
                                                            : 2;
  // Rows that do not all begin at a 16-byte boundary are up to a vector, less one element, longer.
  const bool aligned =
      reinterpret_cast<uintptr_t>(problem.logits) % 16 == 0 && problem.row_stride * size % 16 == 0;
  const int64_t positions = problem.columns + (aligned ? 0 : 16 / size - 1);
  const int64_t tiles = divide_up(positions, kTileWidth);
  const int64_t least = divide_up(tiles, kMaxSegmentsPerRow);
  int64_t per_segment = problem.rows * tiles / kWantedUnits;
  if (per_segment > kMaxTilesPerSegment) per_segment = kMaxTilesPerSegment;
  if (per_segment < least) per_segment = least;
  if (per_segment < 1) per_segment = 1;
  const int64_t width = per_segment * kTileWidth;
  const int64_t per_row = positions > width ? divide_up(positions, width) : 1;
  return {width, per_row, problem.rows * per_row};
}

// The positions of one unit: a segment of a row.
template <class Scalar>
struct Segment {
  int64_t row;
  int64_t begin, end;  // positions
  int shift;           // position = column + shift
  const Scalar* logits;

  __device__ __forceinline__ Segment(const Problem& problem, Units units, int64_t unit) {
    row = unit / units.per_row;
    logits = static_cast<const Scalar*>(problem.logits) + row * problem.row_stride;
    shift = static_cast<int>(reinterpret_cast<uintptr_t>(logits) / sizeof(Scalar) % kWidth<Scalar>);
    begin = unit % units.per_row * units.width;
    const int64_t row_end = problem.columns + shift;
    end = begin + units.width < row_end ? begin + units.width : row_end;
  }
};

// The labels of a vector of kCount elements.
template <class Real, int kCount>
struct VectorLabels {
  uint32_t positive;    // bit i: element i is a positive (hard targets)
  uint32_t observed;    // bit i: element i is in the row and not masked
  Real target[kCount];  // soft targets, NaN where invalid
};

// Numbers of a dense target of row `row`, from `column` on; ignored elements are not observed.
template <class Real, int kCount>
__device__ __forceinline__ void load_numbers(const Problem& problem, int64_t row, int64_t column,
                                             Extent extent, VectorLabels<Real, kCount>& labels) {
  const Labels& target = problem.target;
#pragma unroll
  for (int i = 0; i < kCount; ++i) labels.target[i] = 0;
  load_any(target.data, target.element, row * target.row_stride + column * target.column_stride,
           target.column_stride, extent, labels.target);
  const bool ignores_nan = problem.ignored != problem.ignored;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Real y = labels.target[i];
    if (problem.has_ignored && (ignores_nan ? y != y : y == Real(problem.ignored))) {
      labels.observed &= ~(1u << i);
    }
    labels.target[i] = y >= 0 && y <= 1 ? y : kNaN<Real>;
  }
}

// Shared memory of sparse labels. Of a target or mask a window's labels become a bitmap; of soft
// targets, a tile's become an array of numbers.
template <class Real, bool kSoft>
struct SharedLabels {
  using Bits = unsigned;
  static constexpr int kValues = 1;
};
template <>
struct SharedLabels<float, true> {
  using Bits = unsigned;
  static constexpr int kValues = kTileWidth;
};
template <>
struct SharedLabels<double, true> {
  using Bits = unsigned long long;
  static constexpr int kValues = kTileWidth;
};

// Reads the labels of a row tile by tile. kSoft: targets are wanted as numbers.
template <class Real, int kCount, bool kSoft>
class LabelTiles {
 public:
  using Bits = typename SharedLabels<Real, kSoft>::Bits;

  // The arrays are in shared memory; values [SharedLabels::kValues].
  __device__ __forceinline__ LabelTiles(const Problem& problem,
                                        unsigned (&target_bitmap)[kBitmapWords],
                                        unsigned (&mask_bitmap)[kBitmapWords], Bits* values)
      : problem_(problem),
        target_bitmap_(target_bitmap),
        mask_bitmap_(mask_bitmap),
        values_(values) {}

  __device__ __forceinline__ void start_row(int64_t row, int shift) {
    row_ = row;
    shift_ = shift;
    window_begin_ = -1;
    mask_is_valid_ = find_entries(problem_.mask, row, mask_entries_);
    is_valid_ = find_entries(problem_.target, row, target_entries_) && mask_is_valid_;
  }

  // All threads of the block call this before they ask for vectors of the tile at `begin`; tiles of
  // a row follow each other.
  __device__ __forceinline__ void start_tile(int64_t begin) {
    begin_ = begin;
    const bool is_sparse =
        problem_.target.format == Format::kSparse || problem_.mask.format == Format::kSparse;
    if (!mask_is_valid_ || !is_sparse) return;
    const bool has_values = kSoft && problem_.target.values != nullptr;
    if (window_begin_ >= 0 && begin < window_begin_ + (has_values ? kTileWidth : kBitmapWindow))
      return;
    window_begin_ = begin;
    __syncthreads();  // the previous window has been read
    for (int i = threadIdx.x; i < kBitmapWords; i += kThreads) {
      target_bitmap_[i] = 0;
      mask_bitmap_[i] = 0;
    }
    if (has_values) {
      for (int i = threadIdx.x; i < kTileWidth; i += kThreads) values_[i] = 0;
    }
    __syncthreads();
    const Marking mark{problem_.columns, begin - shift_, has_values ? kTileWidth : kBitmapWindow,
                       static_cast<int>(threadIdx.x), kThreads};
    unsigned out_of_range = 0;
    if (is_valid_) {
      const bool bad_target =
          has_values ? mark.template values<Real>(problem_.target, target_entries_, values_)
                     : mark.bits(problem_.target, target_entries_, target_bitmap_);
      if (bad_target) out_of_range |= kBadTarget;
    }
    if (mark.bits(problem_.mask, mask_entries_, mask_bitmap_)) out_of_range |= kBadMask;
    if (!__syncthreads_or(out_of_range)) return;
    const bool any_bad_mask = __syncthreads_or(out_of_range & kBadMask);
    const bool any_bad_target = __syncthreads_or(out_of_range & kBadTarget);
    mask_is_valid_ = !any_bad_mask;
    is_valid_ = is_valid_ && !any_bad_target && !any_bad_mask;
  }

  // Positions up to which sparse labels have been marked.
  __device__ __forceinline__ int64_t window_end() const {
    return window_begin_ < 0 ? INT64_MAX : window_begin_ + kBitmapWindow;
  }

  // False if the labels of this row cannot be told; its observed elements are NaN then. Every
  // window looks at all entries of the row, so all tiles agree.
  __device__ __forceinline__ bool is_valid() const { return is_valid_; }

  // Of the tile: bit `offset` of the bitmaps, which are byte by byte in the order of labels.
  __device__ __forceinline__ const uint8_t* target_bytes() const {
    return bytes_of(target_bitmap_);
  }
  __device__ __forceinline__ const uint8_t* mask_bytes() const { return bytes_of(mask_bitmap_); }

  // Labels of the vector at `offset` within the tile, of whose elements `extent` are in the row.
  __device__ __forceinline__ VectorLabels<Real, kCount> vector(int offset, Extent extent) const {
    VectorLabels<Real, kCount> labels;
    const uint32_t inside = ((1u << extent.last) - 1u) & ~((1u << extent.first) - 1u);
    labels.positive = 0;
    labels.observed = inside;
    const int64_t column = begin_ + offset - shift_;
    if (is_valid_) {
      read_target(offset, column, extent, labels);
    } else if constexpr (kSoft) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) labels.target[i] = kNaN<Real>;
    }
    const Labels& mask = problem_.mask;
    if (mask.data != nullptr && mask_is_valid_) {
      labels.observed &=
          mask.format == Format::kSparse ? bitmap_at(mask_bitmap_, offset)
          : mask.format == Format::kPacked
              ? load_packed<kCount>(words_of(mask), column, extent)
              : load_bits<kCount>(address_of(mask, column), mask.column_stride, extent);
    }
    return labels;
  }

 private:
  static constexpr unsigned kBadTarget = 1, kBadMask = 2;

  __device__ __forceinline__ uint32_t bitmap_at(const unsigned* bitmap, int offset) const {
    const int place = static_cast<int>(begin_ - window_begin_) + offset;
    return (bitmap[place / 32] >> (place % 32)) & ((1u << kCount) - 1u);
  }

  __device__ __forceinline__ const uint8_t* bytes_of(const unsigned* bitmap) const {
    return reinterpret_cast<const uint8_t*>(bitmap) + (begin_ - window_begin_) / 8;
  }

  __device__ __forceinline__ const uint8_t* address_of(const Labels& labels, int64_t column) const {
    return static_cast<const uint8_t*>(labels.data) + row_ * labels.row_stride +
           column * labels.column_stride;
  }

  __device__ __forceinline__ const uint32_t* words_of(const Labels& labels) const {
    return static_cast<const uint32_t*>(labels.data) + row_ * labels.row_stride;
  }

  __device__ __forceinline__ void read_target(int offset, int64_t column, Extent extent,
                                              VectorLabels<Real, kCount>& labels) const {
    const Labels& target = problem_.target;
    if (target.format == Format::kSparse) {
      if (target_entries_.first == target_entries_.last) {
        if constexpr (kSoft) fill_from_bits(labels);
      } else if (kSoft && target.values != nullptr) {
        if constexpr (kSoft) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const Real value = real_of(values_[offset + i]);
            labels.target[i] = value <= 1 ? value : kNaN<Real>;
          }
        }
      } else {
        labels.positive = bitmap_at(target_bitmap_, offset);
        if constexpr (kSoft) fill_from_bits(labels);
      }
      return;
    }
    if (target.format == Format::kPacked) {
      labels.positive = load_packed<kCount>(words_of(target), column, extent);
      if constexpr (kSoft) fill_from_bits(labels);
      return;
    }
    if (target.element == Element::kBool) {
      labels.positive = load_bits<kCount>(address_of(target, column), target.column_stride, extent);
      if constexpr (kSoft) fill_from_bits(labels);
      return;
    }
    if constexpr (kSoft) load_numbers(problem_, row_, column, extent, labels);
  }

  __device__ __forceinline__ void fill_from_bits(VectorLabels<Real, kCount>& labels) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      labels.target[i] = labels.positive >> i & 1u ? Real(1) : Real(0);
  }

  const Problem& problem_;
  unsigned* const target_bitmap_;
  unsigned* const mask_bitmap_;
  Bits* const values_;
  int64_t row_ = 0;
  int shift_ = 0;
  int64_t begin_ = 0;
  int64_t window_begin_ = -1;
  bool is_valid_ = true;
  bool mask_is_valid_ = true;
  Entries target_entries_, mask_entries_;
};

// Whether targets have to be read as numbers: anything but bool, packed labels, and sparse labels
// without values.
inline bool needs_soft(const Problem& problem) {
  return problem.target.format == Format::kDense ? problem.target.element != Element::kBool
                                                 : problem.target.values != nullptr;
}

}  // namespace mlloss::cuda
