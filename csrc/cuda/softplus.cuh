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

// The bits of a vector's elements in the order in which signs_of_word() shifts them into place: of
// two numbers in a word, 16 apart.
template <class Scalar>
__device__ __forceinline__ uint32_t spread(uint32_t bits) {
  if constexpr (RawLogits<Scalar>::kPerWord == 1) return bits;
  return (bits & 0x55u) | (bits & 0xaau) << 15;
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

// The words of packed labels around [column, column + kCount), and of bytes around `address`: three
// aligned words at most. The caller knows that they are within the row.
template <int kCount, int kVectors>
__device__ __forceinline__ void load_packed_bits(const uint32_t* words, int64_t column,
                                                 uint32_t (&bits)[kVectors]) {
  const uint32_t* first = words + column / 32;
  const uint32_t* last = words + (column + kCount - 1) / 32;  // there may be no word behind `first`
  const int shift = static_cast<int>(column % 32);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    constexpr int kStep = kThreads * kCount / 32;
    bits[k] = funnel_shift_right(first[k * kStep], last[k * kStep], shift);
  }
}

template <int kCount, int kVectors>
__device__ __forceinline__ void load_byte_bits(const uint8_t* bytes, uint32_t (&bits)[kVectors]) {
  constexpr int kStep = kThreads * kCount;
  constexpr int kWords = kCount / 4;
  if (Vector<uint8_t, kCount>::is_aligned(bytes)) {  // the same for all threads
    uint32_t word[kVectors][kWords];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if constexpr (kWords == 2) {
        const uint2 pair = *reinterpret_cast<const uint2*>(bytes + k * kStep);
        word[k][0] = pair.x;
        word[k][1] = pair.y;
      } else {
        word[k][0] = *reinterpret_cast<const uint32_t*>(bytes + k * kStep);
      }
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      bits[k] = nonzero_bytes(word[k][0]);
      if constexpr (kWords == 2) bits[k] |= nonzero_bytes(word[k][1]) << 4;
    }
  } else {
    const int excess = static_cast<int>(reinterpret_cast<uintptr_t>(bytes) % 4);
    const auto* words = reinterpret_cast<const uint32_t*>(bytes - excess);
    uint32_t word[kVectors][kWords + 1];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int w = 0; w <= kWords; ++w) word[k][w] = words[k * (kStep / 4) + w];
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      bits[k] = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t both = funnel_shift_right(word[k][w], word[k][w + 1], 8 * excess);
        bits[k] |= nonzero_bytes(both) << (4 * w);
      }
    }
  }
}

// `bitmap` holds the tile's labels; `offset` is that of the thread's first vector in the tile.
template <int kCount, int kVectors>
__device__ __forceinline__ void load_bitmap_bits(const uint8_t* bitmap, int offset,
                                                 uint32_t (&bits)[kVectors]) {
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    bits[k] = static_cast<uint32_t>(bitmap[offset / 8 + k * (kThreads * kCount / 8)]) >> offset % 8;
  }
}

// The bits of a thread's vectors of a tile that lies within the row, `column` and `offset` those of
// the first one. Bits beyond the elements of a vector are anything.
template <Source kSource, int kCount, int kVectors>
__device__ __forceinline__ void load_bits_of_tile(const Labels& labels, const uint8_t* bitmap,
                                                  int64_t row, int64_t column, int offset,
                                                  uint32_t (&bits)[kVectors]) {
  const auto packed = [&] {
    const auto* words = static_cast<const uint32_t*>(labels.data) + row * labels.row_stride;
    load_packed_bits<kCount>(words, column, bits);
  };
  const auto bytes = [&] {
    const auto* data = static_cast<const uint8_t*>(labels.data) + row * labels.row_stride;
    load_byte_bits<kCount>(data + column, bits);
  };
  if constexpr (kSource == Source::kPacked) {
    packed();
  } else if constexpr (kSource == Source::kBytes) {
    bytes();
  } else if constexpr (kSource == Source::kBitmap) {
    load_bitmap_bits<kCount>(bitmap, offset, bits);
  } else if constexpr (kSource == Source::kAny) {
    if (labels.format == Format::kPacked) {
      packed();
    } else if (labels.format == Format::kDense) {
      bytes();
    } else {
      load_bitmap_bits<kCount>(bitmap, offset, bits);
    }
  }
}

// Whether whole vectors of labels in columns [begin, end) of a row can be loaded as words.
__device__ __forceinline__ bool has_whole_words(const Labels& labels, int64_t row, int64_t begin,
                                                int64_t end, int64_t columns) {
  if (labels.data == nullptr || labels.format != Format::kDense) return true;
  if (labels.column_stride != 1) return false;
  const auto* bytes = static_cast<const uint8_t*>(labels.data) + row * labels.row_stride + begin;
  // Aligned words stick out by up to three bytes, which others may own.
  return reinterpret_cast<uintptr_t>(bytes) % 8 == 0 || (begin >= 4 && end + 4 <= columns);
}

// ---- The kernel ----

enum class Pass { kForward, kBackward, kOnePass };

constexpr bool has_loss(Pass pass) { return pass != Pass::kBackward; }
constexpr bool has_gradient(Pass pass) { return pass != Pass::kForward; }

struct SoftplusOutput {
  PartialSum* partial = nullptr;   // [gridDim.x], of passes with a loss
  void* gradient = nullptr;        // [N, C], of passes with a gradient; may be the logits
  int64_t gradient_row_stride = 0;
  const double* scale = nullptr;     // 0-d
  const void* upstream = nullptr;    // 0-d: what the gradient is multiplied by besides; nullptr = 1
  Element upstream_element = Element::kDouble;
};

// Elements over which a thread collects the argument of one logarithm: q < 2^64.
constexpr int kGroup = 64;

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
  logits = {{bits.x, bits.y, bits.z, bits.w}};
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

// The thread's vectors of a tile all of which is in the row, and whose labels can be loaded as
// words. `gradient` is that row's.
template <class Scalar, Source kTarget, Source kMask, Pass kPass, class Tiles>
__device__ __forceinline__ void pass_over_inner_tile(const PointwiseProblem& problem,
                                                     const Segment<Scalar>& segment, int64_t begin,
                                                     const Tiles& labels, Scalar* gradient,
                                                     float scale, Group& group) {
  constexpr int kCount = kWidth<Scalar>;
  constexpr int kVectors = kPerThread / kCount;
  constexpr int kStep = kThreads * kCount;
  constexpr bool kTargets = kTarget != Source::kNone;
  constexpr bool kMasked = kMask != Source::kNone;
  const int offset = static_cast<int>(threadIdx.x) * kCount;
  const int64_t column = begin + offset - segment.shift;
  // All loads come first, so that they are on their way together.
  RawLogits<Scalar> logits[kVectors];
  uint32_t positive[kVectors] = {}, observed[kVectors] = {};
#pragma unroll
  for (int k = 0; k < kVectors; ++k) load_raw(segment.logits + column + k * kStep, logits[k]);
  load_bits_of_tile<kTarget, kCount>(problem.target, labels.target_bytes(), segment.row, column,
                                     offset, positive);
  load_bits_of_tile<kMask, kCount>(problem.mask, labels.mask_bytes(), segment.row, column, offset,
                                   observed);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    pass_over_vector<kPass, kTargets, kMasked>(logits[k], positive[k], observed[k], scale, group.q,
                                               group.linear);
    if constexpr (has_loss(kPass)) {
      group.counted += kMasked ? __popc(observed[k] & ((1u << kCount) - 1u)) : kCount;
    }
  }
  if constexpr (has_gradient(kPass)) {
    Scalar* out = gradient + column;
    if (reinterpret_cast<uintptr_t>(out) % 16 == 0) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) store_raw(logits[k], out + k * kStep);
    } else {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) store_raw(logits[k], {0, kCount}, out + k * kStep);
    }
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
  double total = 0, denominator = 0;
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const Segment<Scalar> segment(problem, units, unit);
    Scalar* gradient = static_cast<Scalar*>(output.gradient);
    if constexpr (has_gradient(kPass)) gradient += segment.row * output.gradient_row_stride;
    labels.start_row(segment.row, segment.shift);
    Group group;
    int collected = 0;
    for (int64_t begin = segment.begin; begin < segment.end; begin += kTileWidth) {
      labels.start_tile(begin);
      const int64_t first = begin - segment.shift, last = first + kTileWidth;
      const bool is_inner =
          first >= 0 && last <= problem.columns && labels.is_valid() &&
          has_whole_words(problem.target, segment.row, first, last, problem.columns) &&
          has_whole_words(problem.mask, segment.row, first, last, problem.columns);
      if (!is_inner) {
        pass_over_edge_tile<Scalar, kPass>(problem, segment, begin, labels, gradient, scale, group);
      } else if (kTarget == Source::kBitmap && !labels.tile_has_positives()) {
        // Most tiles of a row with many labels.
        pass_over_inner_tile<Scalar, Source::kNone, kMask, kPass>(problem, segment, begin, labels,
                                                                  gradient, scale, group);
      } else {
        pass_over_inner_tile<Scalar, kTarget, kMask, kPass>(problem, segment, begin, labels,
                                                            gradient, scale, group);
      }
      if constexpr (has_loss(kPass)) {
        collected += kPerThread;
        if (collected < kGroup && begin + kTileWidth < segment.end) continue;
        total += group.linear + log1p_nonnegative(group.q);
        denominator += group.counted;
        group = {};
        collected = 0;
      }
    }
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
  constexpr int kVectors = kPerThread / kCount;
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(double, warps, kWarps);

  LabelTiles<float, kCount, false> labels(problem, target_bitmap, mask_bitmap, nullptr);
  const int offset = static_cast<int>(threadIdx.x) * kCount;
  int64_t counted = 0;
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const Segment<Scalar> segment(problem, units, unit);
    labels.start_row(segment.row, segment.shift);
    for (int64_t begin = segment.begin; begin < segment.end; begin += kTileWidth) {
      labels.start_tile(begin);
      const int64_t first = begin - segment.shift, last = first + kTileWidth;
      uint32_t observed[kVectors];
      if (first >= 0 && last <= problem.columns && labels.is_valid() &&
          has_whole_words(problem.mask, segment.row, first, last, problem.columns)) {
        load_bits_of_tile<Source::kAny, kCount>(problem.mask, labels.mask_bytes(), segment.row,
                                                first + offset, offset, observed);
#pragma unroll
        for (int k = 0; k < kVectors; ++k) counted += __popc(observed[k] & ((1u << kCount) - 1u));
        continue;
      }
      for (int k = 0; k < kVectors; ++k) {
        const int64_t column = first + offset + k * kThreads * kCount;
        const Extent extent = extent_of<kCount>(column, problem.columns);
        if (extent.first >= extent.last) continue;
        counted += __popc(labels.vector(offset + k * kThreads * kCount, extent).observed);
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
    const double elements = static_cast<double>(problem.rows) * static_cast<double>(problem.columns);
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
