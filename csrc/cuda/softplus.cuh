// The kernels of losses that are softplus(z), z = x for negatives and -x for positives: hard
// targets, no weights, one sum (sigmoid cross-entropy as most people use it). Everything else takes
// the kernels of pointwise.cuh.
//
// Bytes per element, s = size of a logit, t and u = bytes of target and mask (bool 1, packed 1/8,
// sparse about 0): forward s + t + u, backward and one pass 2 s + t + u. Expected limit: memory,
// which leaves about 8 instructions per byte. bench/instructions.py counts them. Not measured on a
// GPU yet.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cuda/reduce.cuh"
#include "cuda/tiles.cuh"
#include "cuda/vector.cuh"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss::cuda {

// ---- Numbers as bits ----

// 16 bytes of logits in registers. Targets flip signs and masks drop elements while two numbers of
// 16 bits still lie in one register.
template <class Scalar>
struct RawLogits {
  static constexpr int kWords = 4;
  static constexpr int kPerWord = kWidth<Scalar> / kWords;
  uint32_t word[kWords];
};

// A negative of which neither loss nor gradient is left: e^-128 is 0 here.
template <class Scalar>
constexpr uint32_t kDropped = 0xc3000000u;  // -128
template <>
inline constexpr uint32_t kDropped<__nv_bfloat16> = 0xc300c300u;
template <>
inline constexpr uint32_t kDropped<__half> = 0xd800d800u;

template <class Scalar>
constexpr uint32_t kRawNaN = 0x7fc00000u;
template <>
inline constexpr uint32_t kRawNaN<__nv_bfloat16> = 0x7fc07fc0u;
template <>
inline constexpr uint32_t kRawNaN<__half> = 0x7e007e00u;

// The bits of a vector's elements as signs_of_word() shifts them into place: of two numbers in a
// word, neighbouring bits come to lie 16 apart.
template <class Scalar>
__device__ __forceinline__ uint32_t spread(uint32_t bits) {
  return RawLogits<Scalar>::kPerWord == 1 ? bits : bits * 0x8001u;
}

// The sign bits of the elements in word j are those elements' bits; the other bits are anything.
template <class Scalar>
__device__ __forceinline__ uint32_t signs_of_word(uint32_t spread_bits, int j) {
  return spread_bits << (RawLogits<Scalar>::kPerWord == 1 ? 31 - j : 15 - 2 * j);
}

template <class Scalar>
constexpr uint32_t kSigns = RawLogits<Scalar>::kPerWord == 1 ? 0x80000000u : 0x80008000u;

// All bits of the elements of word j whose bit is set.
template <class Scalar>
__device__ __forceinline__ uint32_t elements_of_word(uint32_t spread_bits, int j) {
  const uint32_t signs = signs_of_word<Scalar>(spread_bits, j);
  if constexpr (RawLogits<Scalar>::kPerWord == 1) {
    return static_cast<uint32_t>(static_cast<int32_t>(signs) >> 31);
  }
  return spread_signs_of_halves(signs);
}

__device__ __forceinline__ void widen(const RawLogits<float>& raw, float (&out)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = __uint_as_float(raw.word[j]);
}
__device__ __forceinline__ void widen(const RawLogits<__nv_bfloat16>& raw, float (&out)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    out[2 * j] = __uint_as_float(raw.word[j] << 16);
    out[2 * j + 1] = __uint_as_float(raw.word[j] & 0xffff0000u);
  }
}
__device__ __forceinline__ void widen(const RawLogits<__half>& raw, float (&out)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    __half2 pair;
    memcpy(&pair, &raw.word[j], sizeof pair);
    out[2 * j] = __low2float(pair);
    out[2 * j + 1] = __high2float(pair);
  }
}

__device__ __forceinline__ void narrow(const float (&values)[4], RawLogits<float>& raw) {
#pragma unroll
  for (int j = 0; j < 4; ++j) raw.word[j] = __float_as_uint(values[j]);
}
__device__ __forceinline__ void narrow(const float (&values)[8], RawLogits<__nv_bfloat16>& raw) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * j], values[2 * j + 1]);
    memcpy(&raw.word[j], &pair, sizeof pair);
  }
}
__device__ __forceinline__ void narrow(const float (&values)[8], RawLogits<__half>& raw) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const __half2 pair = __floats2half2_rn(values[2 * j], values[2 * j + 1]);
    memcpy(&raw.word[j], &pair, sizeof pair);
  }
}

// ---- Labels of whole vectors, as bits ----

// How target or mask reach a kernel; kAny asks for each vector, for combinations that are rare.
enum class Source { kNone, kPacked, kBytes, kBitmap, kAny };

inline Source source_of(const Labels& labels) {
  if (labels.data == nullptr) return Source::kNone;
  if (labels.format == Format::kPacked) return Source::kPacked;
  return labels.format == Format::kSparse ? Source::kBitmap : Source::kBytes;
}

// Bit i of the result: byte i is not 0. Torch's bools are 0 or 1, but for those that are views of
// something else.
__device__ __forceinline__ uint32_t nonzero_bytes(uint32_t bytes) {
  const uint32_t flags = (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
  // Bits 7, 15, 23 and 31 move to 28, 29, 30 and 31; what else the product holds does not carry.
  return flags * 0x00204081u >> 28;
}

// The labels of a vector as they have been loaded.
template <Source kSource, int kCount>
struct RawLabels {
  static constexpr bool kIsBytes = kSource == Source::kBytes;
  static constexpr int kWords = kIsBytes ? kCount / 4 : 1;
  uint32_t word[kWords];  // bytes, or bits

  __device__ __forceinline__ uint32_t any() const {
    if constexpr (kSource == Source::kNone) return 0;
    return word[0] | word[kWords - 1];
  }

  __device__ __forceinline__ uint32_t bits() const {
    if constexpr (!kIsBytes) return word[0];
    return nonzero_bytes(word[0]) | (kWords > 1 ? nonzero_bytes(word[kWords - 1]) << 4 : 0);
  }
};

// The labels of a thread's vectors along a row.
template <Source kSource, int kCount>
class LabelCursor {
 public:
  static constexpr uint32_t kElements = (1u << kCount) - 1u;
  static constexpr int kStep = kThreads * kCount;  // from one vector of a thread to the next

  // `column` is that of the thread's first vector, which may be in front of the row.
  __device__ __forceinline__ LabelCursor(const Labels& labels, int64_t row, int64_t column) {
    if constexpr (kSource == Source::kNone) return;
    first_ = last_ = static_cast<const uint8_t*>(labels.data);
    if constexpr (kSource == Source::kBitmap) return;
    is_bitmap_ = kSource == Source::kAny && labels.format == Format::kSparse;
    is_bytes_ = kSource == Source::kBytes || labels.format == Format::kDense;
    if (is_bitmap_) return;
    if (!is_bytes_) {
      const auto* words = static_cast<const uint32_t*>(labels.data) + row * labels.row_stride;
      first_ = reinterpret_cast<const uint8_t*>(words + (column >> 5));
      // There may be no word behind the first one.
      last_ = reinterpret_cast<const uint8_t*>(words + ((column + kCount - 1) >> 5));
      shift_ = static_cast<int>(column & 31);
    } else {
      first_ = static_cast<const uint8_t*>(labels.data) + row * labels.row_stride + column;
      is_whole_ = reinterpret_cast<uintptr_t>(first_) % kCount == 0;
      shift_ = 8 * static_cast<int>(reinterpret_cast<uintptr_t>(first_) % 4);
      if (!is_whole_) first_ -= shift_ / 8;
    }
  }

  // A run of vectors begins, whose labels are in `bitmap` if they are sparse.
  __device__ __forceinline__ void start_run(const uint8_t* bitmap) {
    if (kSource == Source::kBitmap || is_bitmap_) first_ = bitmap;
  }

  __device__ __forceinline__ void advance(int positions) {
    if constexpr (kSource == Source::kNone) return;
    const bool is_bytes = kSource == Source::kBytes || (kSource == Source::kAny && is_bytes_);
    const int bytes = is_bytes ? positions : positions / 8;
    first_ += bytes;
    if constexpr (kSource == Source::kPacked || kSource == Source::kAny) last_ += bytes;
  }

  // Vectors from here on.
  template <int kVectors>
  __device__ __forceinline__ void load(RawLabels<kSource, kCount> (&labels)[kVectors]) const {
    if constexpr (kSource == Source::kPacked) load_packed(labels);
    if constexpr (kSource == Source::kBytes) load_bytes(labels);
    if constexpr (kSource == Source::kBitmap) load_bitmap(labels);
    if constexpr (kSource == Source::kAny) {
      if (is_bytes_) {
        RawLabels<Source::kBytes, kCount> bytes[kVectors];
        load_bytes(bytes);
#pragma unroll
        for (int k = 0; k < kVectors; ++k) labels[k].word[0] = bytes[k].bits();
      } else if (is_bitmap_) {
        load_bitmap(labels);
      } else {
        load_packed(labels);
      }
    }
  }

 private:
  template <int kVectors>
  __device__ __forceinline__ void load_bitmap(
      RawLabels<kSource, kCount> (&labels)[kVectors]) const {
    const int offset = static_cast<int>(threadIdx.x) * kCount;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const uint32_t byte = first_[offset / 8 + k * (kStep / 8)];
      labels[k].word[0] = kCount < 8 ? byte >> offset % 8 & kElements : byte;
    }
  }

  template <int kVectors>
  __device__ __forceinline__ void load_packed(
      RawLabels<kSource, kCount> (&labels)[kVectors]) const {
    constexpr int kBytes = kStep / 8;
    uint32_t low[kVectors], high[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      low[k] = *reinterpret_cast<const uint32_t*>(first_ + k * kBytes);
      high[k] = *reinterpret_cast<const uint32_t*>(last_ + k * kBytes);
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      labels[k].word[0] = funnel_shift_right(low[k], high[k], shift_) & kElements;
    }
  }

  template <int kVectors>
  __device__ __forceinline__ void load_bytes(
      RawLabels<Source::kBytes, kCount> (&labels)[kVectors]) const {
    constexpr int kWords = kCount / 4;
    if (is_whole_) {  // the same for all threads
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        Vector<uint8_t, kCount> vector;
        vector.load(first_ + k * kStep);
        memcpy(labels[k].word, vector.element, sizeof labels[k].word);
      }
      return;
    }
    uint32_t around[kVectors][kWords + 1];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int w = 0; w <= kWords; ++w) {
        around[k][w] = *reinterpret_cast<const uint32_t*>(first_ + k * kStep + 4 * w);
      }
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        labels[k].word[w] = funnel_shift_right(around[k][w], around[k][w + 1], shift_);
      }
    }
  }

  const uint8_t* first_ = nullptr;  // also of a bitmap
  const uint8_t* last_ = nullptr;
  int shift_ = 0;
  bool is_whole_ = true;  // bytes that are aligned
  bool is_bytes_ = false, is_bitmap_ = false;
};

// Whether the bytes of dense labels follow each other.
__device__ __forceinline__ bool is_in_order(const Labels& labels) {
  return labels.data == nullptr || labels.format != Format::kDense || labels.column_stride == 1;
}

// How far the words that hold a vector's labels may reach beyond them, to either side.
__device__ __forceinline__ int reach_of(const Labels& labels, int64_t row) {
  if (labels.data == nullptr || labels.format != Format::kDense) return 0;
  const auto* bytes = static_cast<const uint8_t*>(labels.data) + row * labels.row_stride;
  return reinterpret_cast<uintptr_t>(bytes) % 4 == 0 ? 0 : 4;
}

// ---- The kernel ----

enum class Pass { kForward, kBackward, kOnePass };

constexpr bool has_loss(Pass pass) { return pass != Pass::kBackward; }
constexpr bool has_gradient(Pass pass) { return pass != Pass::kForward; }

struct SoftplusOutput {
  PartialSum* partial = nullptr;  // [gridDim.x], of passes with a loss
  void* gradient = nullptr;       // [N, C], of passes with a gradient; may be the logits
  int64_t gradient_row_stride = 0;
  const double* scale = nullptr;   // 0-d
  const void* upstream = nullptr;  // 0-d: what the gradient is multiplied by besides; nullptr = 1
  Element upstream_element = Element::kDouble;
};

// Elements from which on a thread takes the logarithm of what it has collected; it never has more
// than kGroup + 31, so that q < 2^127.
constexpr int kGroup = 96;

// Makes every element a negative: the sign of positives is flipped, and what is not observed is
// dropped.
template <bool kTargets, bool kMasked, class Scalar>
__device__ __forceinline__ void flip_and_drop(RawLogits<Scalar>& logits, uint32_t positive,
                                              uint32_t observed) {
#pragma unroll
  for (int j = 0; j < RawLogits<Scalar>::kWords; ++j) {
    if constexpr (kTargets) {
      logits.word[j] ^= signs_of_word<Scalar>(positive, j) & kSigns<Scalar>;
    }
    if constexpr (kMasked) {
      const uint32_t elements = elements_of_word<Scalar>(observed, j);
      logits.word[j] = (logits.word[j] & elements) | (kDropped<Scalar> & ~elements);
    }
  }
}

// Adds the losses of a vector to a thread's group, and turns its logits into gradients.
template <Pass kPass, bool kTargets, bool kMasked, class Scalar>
__device__ __forceinline__ void pass_over_vector(RawLogits<Scalar>& logits, uint32_t positive_bits,
                                                 uint32_t observed_bits, float scale, float& q,
                                                 float& linear) {
  constexpr int kCount = kWidth<Scalar>;
  if constexpr (kTargets && kMasked && has_gradient(kPass)) positive_bits &= observed_bits;
  const uint32_t positive = spread<Scalar>(positive_bits);
  const uint32_t observed = spread<Scalar>(observed_bits);
  flip_and_drop<kTargets, kMasked>(logits, positive, observed);
  float z[kCount];
  widen(logits, z);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float e = exp_nonpositive(-absolute(z[i]));
    if constexpr (has_loss(kPass)) {
      linear += fmaxf(z[i], 0.0f);  // that of NaN does not matter: e is NaN
      q = q * e + (q + e);
    }
    if constexpr (has_gradient(kPass)) {
      z[i] = (z[i] < 0 ? scale * e : scale) * reciprocal(1.0f + e);
    }
  }
  if constexpr (has_gradient(kPass)) {
    narrow(z, logits);
#pragma unroll
    for (int j = 0; j < RawLogits<Scalar>::kWords; ++j) {
      if constexpr (kTargets) {
        logits.word[j] ^= signs_of_word<Scalar>(positive, j) & kSigns<Scalar>;
      }
      // 0 times a scale that is not finite would not be 0.
      if constexpr (kMasked) logits.word[j] &= elements_of_word<Scalar>(observed, j);
    }
  }
}

template <class Scalar>
__device__ __forceinline__ void load_raw(const Scalar* address, RawLogits<Scalar>& logits) {
  const uint4 bits = *reinterpret_cast<const uint4*>(address);
  logits.word[0] = bits.x;
  logits.word[1] = bits.y;
  logits.word[2] = bits.z;
  logits.word[3] = bits.w;
}

// The elements of a vector that are in the row; the others are dropped.
template <class Scalar>
__device__ __forceinline__ void load_raw(const Scalar* address, Extent extent,
                                         RawLogits<Scalar>& logits) {
  if (is_full<kWidth<Scalar>>(extent)) return load_raw(address, logits);
#pragma unroll
  for (int j = 0; j < RawLogits<Scalar>::kWords; ++j) logits.word[j] = kDropped<Scalar>;
  Scalar elements[kWidth<Scalar>];
  memcpy(elements, logits.word, sizeof elements);
#pragma unroll
  for (int i = 0; i < kWidth<Scalar>; ++i) {
    if (extent.holds(i)) elements[i] = address[i];
  }
  memcpy(logits.word, elements, sizeof elements);
}

template <class Scalar>
__device__ __forceinline__ void store_raw(const RawLogits<Scalar>& values, Scalar* address) {
  *reinterpret_cast<uint4*>(address) = {values.word[0], values.word[1], values.word[2],
                                        values.word[3]};
}

template <class Scalar>
__device__ __forceinline__ void store_raw(const RawLogits<Scalar>& values, Extent extent,
                                          Scalar* address) {
  Scalar elements[kWidth<Scalar>];
  memcpy(elements, values.word, sizeof elements);
#pragma unroll
  for (int i = 0; i < kWidth<Scalar>; ++i) {
    if (extent.holds(i)) address[i] = elements[i];
  }
}

// What a thread has of its losses: log1p(q) + linear is the sum over its group.
struct Group {
  float q = 0, linear = 0;
  unsigned counted = 0;  // observed elements
};

// Tiles that a block takes at once where all of them are in the row: of 16-bit numbers, whose time
// is that of instructions rather than bytes, two, so that addresses and loops cost little; one
// where there are not enough registers for more.
template <class Scalar, Source kMask, Pass kPass>
constexpr int kInnerTiles =
    sizeof(Scalar) == 2 && !(kMask != Source::kNone && has_gradient(kPass)) ? 2 : 1;

// A thread's vectors along a row.
template <class Scalar, Source kTarget, Source kMask, Pass kPass>
struct TileCursor {
  static constexpr int kCount = kWidth<Scalar>;
  const Scalar* logits;
  Scalar* gradient;
  LabelCursor<kTarget, kCount> target;
  LabelCursor<kMask, kCount> mask;

  // At the tile that begins at `begin`; `gradient_row` is nullptr in a pass without a gradient.
  __device__ __forceinline__ TileCursor(const PointwiseProblem& problem,
                                        const Segment<Scalar>& segment, int64_t begin,
                                        Scalar* gradient_row)
      : TileCursor(problem, segment, gradient_row,
                   begin - segment.shift + static_cast<int>(threadIdx.x) * kCount) {}

  __device__ __forceinline__ void advance(int positions) {
    logits += positions;
    if constexpr (has_gradient(kPass)) gradient += positions;
    target.advance(positions);
    mask.advance(positions);
  }

 private:
  __device__ __forceinline__ TileCursor(const PointwiseProblem& problem,
                                        const Segment<Scalar>& segment, Scalar* gradient_row,
                                        int64_t column)
      : logits(segment.logits + column),
        gradient(has_gradient(kPass) ? gradient_row + column : nullptr),
        target(problem.target, segment.row, column),
        mask(problem.mask, segment.row, column) {}
};

// The thread's vectors of an inner stretch of the row.
template <class Scalar, Source kTarget, Source kMask, Pass kPass>
__device__ __forceinline__ void pass_over_inner_tiles(
    const TileCursor<Scalar, kTarget, kMask, kPass>& cursor, float scale, Group& group) {
  constexpr int kCount = kWidth<Scalar>;
  constexpr int kVectors = kInnerTiles<Scalar, kMask, kPass> * kPerThread / kCount;
  constexpr int kStep = kThreads * kCount;
  constexpr bool kMasked = kMask != Source::kNone;
  // All loads come first, so that they are on their way together.
  RawLogits<Scalar> logits[kVectors];
  RawLabels<kTarget, kCount> targets[kVectors];
  RawLabels<kMask, kCount> masks[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) load_raw(cursor.logits + k * kStep, logits[k]);
  cursor.target.load(targets);
  cursor.mask.load(masks);
  const auto pass = [&](auto has_positives) {
    constexpr bool kTargets = decltype(has_positives)::value;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const uint32_t positive = kTargets ? targets[k].bits() : 0u;
      const uint32_t observed = kMasked ? masks[k].bits() : 0u;
      pass_over_vector<kPass, kTargets, kMasked>(logits[k], positive, observed, scale, group.q,
                                                 group.linear);
      if constexpr (has_loss(kPass)) group.counted += kMasked ? __popc(observed) : kCount;
      if constexpr (has_gradient(kPass)) store_raw(logits[k], cursor.gradient + k * kStep);
    }
  };
  uint32_t any = 0;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) any |= targets[k].any();
  // Of many labels few are positive: most warps have none, and nothing to flip.
  if (__any_sync(kFullWarp, any != 0)) {
    pass(std::true_type{});
  } else {
    pass(std::false_type{});
  }
}

// The same for any tile, whose labels may even be unknown.
template <class Scalar, Pass kPass, class Tiles>
__device__ __forceinline__ void pass_over_edge_tile(const PointwiseProblem& problem,
                                                    const Segment<Scalar>& segment, int64_t begin,
                                                    const Tiles& labels, Scalar* gradient,
                                                    float scale, Group& group) {
  constexpr int kCount = kWidth<Scalar>;
#pragma unroll 1
  for (int k = 0; k < kPerThread / kCount; ++k) {
    const int offset = (k * kThreads + static_cast<int>(threadIdx.x)) * kCount;
    const int64_t column = begin + offset - segment.shift;
    const Extent extent = extent_of<kCount>(column, problem.columns);
    if (extent.first >= extent.last) continue;
    RawLogits<Scalar> logits;
    load_raw(segment.logits + column, extent, logits);
    const VectorLabels<float, kCount> vector = labels.vector(offset, extent);
    if (!labels.is_valid()) {
#pragma unroll
      for (uint32_t& word : logits.word) word = kRawNaN<Scalar>;
    }
    pass_over_vector<kPass, true, true>(logits, vector.positive, vector.observed, scale, group.q,
                                        group.linear);
    if constexpr (has_loss(kPass)) group.counted += __popc(vector.observed);
    if constexpr (has_gradient(kPass)) {
      Scalar* out = gradient + column;
      if (is_full<kCount>(extent) && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
        store_raw(logits, out);
      } else {
        store_raw(logits, extent, out);
      }
    }
  }
}

// The gradient may be the logits: neither is __restrict__.
template <class Scalar, Source kTarget, Source kMask, Pass kPass>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Scalar>)
    softplus(const PointwiseProblem problem, const Units units, const SoftplusOutput output) {
  constexpr int kCount = kWidth<Scalar>;
  using Tiles = LabelTiles<float, kCount, false>;
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(double, warps, kWarps);

  Tiles labels(problem, target_bitmap, mask_bitmap, nullptr);
  float scale = 0;
  if constexpr (has_gradient(kPass)) {
    const double upstream = output.upstream == nullptr
                                ? 1.0
                                : load_one<double>(output.upstream, output.upstream_element, 0);
    scale = static_cast<float>(*output.scale * upstream);
  }
  const bool has_bytes_in_order = is_in_order(problem.target) && is_in_order(problem.mask);
  double total = 0, denominator = 0;
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const Segment<Scalar> segment(problem, units, unit);
    Scalar* gradient = static_cast<Scalar*>(output.gradient);
    if constexpr (has_gradient(kPass)) gradient += segment.row * output.gradient_row_stride;
    labels.start_row(segment.row, segment.shift);
    const int reach =
        max(reach_of(problem.target, segment.row), reach_of(problem.mask, segment.row));
    constexpr int kInnerPerThread = kInnerTiles<Scalar, kMask, kPass> * kPerThread;
    constexpr int kInnerWidth = kInnerTiles<Scalar, kMask, kPass> * kTileWidth;
    const int64_t inner_begin = segment.shift + reach;
    const bool has_inner =
        has_bytes_in_order &&
        (!has_gradient(kPass) ||
         reinterpret_cast<uintptr_t>(gradient - segment.shift) % sizeof(uint4) == 0);
    const int64_t inner_end = has_inner ? problem.columns + segment.shift - reach : INT64_MIN;
    TileCursor<Scalar, kTarget, kMask, kPass> cursor(problem, segment, segment.begin, gradient);
    Group group;
    int collected = 0;
    const auto collect = [&](int elements) {
      if constexpr (has_loss(kPass)) {
        collected += elements;
        if (collected < kGroup) return;
        total += group.linear + log1p_nonnegative(group.q);
        denominator += group.counted;
        group = {};
        collected = 0;
      }
    };
    for (int64_t begin = segment.begin; begin < segment.end;) {
      labels.start_tile(begin);
      const int64_t end = min(inner_end, min(labels.window_end(), segment.end));
      const bool is_inner = labels.is_valid() && begin >= inner_begin && begin + kInnerWidth <= end;
      if (is_inner) {
        cursor.target.start_run(labels.target_bytes());
        cursor.mask.start_run(labels.mask_bytes());
        int passes = static_cast<int>((end - begin) / kInnerWidth);
        begin += int64_t(passes) * kInnerWidth;
        for (; passes > 0; --passes) {
          pass_over_inner_tiles(cursor, scale, group);
          cursor.advance(kInnerWidth);
          collect(kInnerPerThread);
        }
      } else {
        pass_over_edge_tile<Scalar, kPass>(problem, segment, begin, labels, gradient, scale, group);
        cursor.advance(kTileWidth);
        begin += kTileWidth;
        collect(kPerThread);
      }
    }
    collect(kGroup);
  }
  if constexpr (has_loss(kPass)) {
    total = block_sum(total, warps);
    denominator = block_sum(denominator, warps);
    if (threadIdx.x == 0) output.partial[blockIdx.x] = {total, denominator};
  }
}

// Counts the observed elements: the denominator of a mean has to be known before one pass writes
// the gradient.
template <class Scalar>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Scalar>)
    count_observed(const PointwiseProblem problem, const Units units,
                   PartialSum* __restrict__ partial) {  // [gridDim.x]
  constexpr int kCount = kWidth<Scalar>;
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(double, warps, kWarps);

  LabelTiles<float, kCount, false> labels(problem, target_bitmap, mask_bitmap, nullptr);
  int64_t counted = 0;
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const Segment<Scalar> segment(problem, units, unit);
    labels.start_row(segment.row, segment.shift);
    for (int64_t begin = segment.begin; begin < segment.end; begin += kTileWidth) {
      labels.start_tile(begin);
      for (int k = 0; k < kPerThread / kCount; ++k) {
        const int offset = (k * kThreads + static_cast<int>(threadIdx.x)) * kCount;
        const Extent extent = extent_of<kCount>(begin + offset - segment.shift, problem.columns);
        if (extent.first >= extent.last) continue;
        counted += __popc(labels.vector(offset, extent).observed);
      }
    }
  }
  const double sum = block_sum(static_cast<double>(counted), warps);
  if (threadIdx.x == 0) partial[blockIdx.x] = {0, sum};
}

// ---- Launching ----

// Calls run(SourceConstant<target>, SourceConstant<mask>) for the kernels that there are.
template <Source kSource>
struct SourceConstant {
  static constexpr Source value = kSource;
};

template <class Run>
cudaError_t dispatch_sources(const PointwiseProblem& problem, const Run& run) {
  using Any = SourceConstant<Source::kAny>;
  using None = SourceConstant<Source::kNone>;
  const Source target = source_of(problem.target), mask = source_of(problem.mask);
  const auto with_mask = [&](auto source) {
    if (mask == Source::kNone) return run(source, None{});
    return mask == target ? run(source, source) : run(Any{}, Any{});
  };
  switch (target) {
    case Source::kPacked:
      return with_mask(SourceConstant<Source::kPacked>{});
    case Source::kBytes:
      return with_mask(SourceConstant<Source::kBytes>{});
    default:
      return with_mask(SourceConstant<Source::kBitmap>{});
  }
}

template <class Scalar, Pass kPass>
cudaError_t launch_softplus(const PointwiseProblem& problem, const SoftplusOutput& output,
                            int64_t most_blocks, cudaStream_t stream) {
  const Units units = units_of(problem);
  return dispatch_sources(problem, [&](auto target, auto mask) {
    return MLLOSS_LAUNCH((softplus<Scalar, decltype(target)::value, decltype(mask)::value, kPass>),
                         grid_of(units.count, most_blocks), dim3(kThreads), stream, problem, units,
                         output);
  });
}

// The scale of the gradient, before one pass.
template <class Scalar>
cudaError_t launch_scale_of_softplus(const PointwiseProblem& problem, PartialSum* partial,
                                     double* scale, cudaStream_t stream) {
  const bool counts = problem.reduction == Reduction::kMean ||
                      problem.reduction == Reduction::kMeanNonzero ||
                      problem.reduction == Reduction::kWeightedMean;
  if (!counts || problem.mask.data == nullptr) {
    const double elements =
        static_cast<double>(problem.rows) * static_cast<double>(problem.columns);
    return launch_scale(problem, partial, 0, elements, scale, stream);
  }
  const Units units = units_of(problem);
  const dim3 grid = grid_of(units.count, kReductionBlocks);
  const cudaError_t error = MLLOSS_LAUNCH((count_observed<Scalar>), grid, dim3(kThreads), stream,
                                          problem, units, partial);
  if (error != cudaSuccess) return error;
  return launch_scale(problem, partial, static_cast<int>(grid.x), 0, scale, stream);
}

}  // namespace mlloss::cuda
