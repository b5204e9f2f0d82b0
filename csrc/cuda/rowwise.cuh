// Kernels of losses that are a function of two sums over a row: of e^-x over its positives and of
// e^x over its negatives. See math/multilabel_categorical_crossentropy.h.
//
// Short rows      a part of a warp per row, all passes in one kernel, the row in registers
// Forward         rows split over blocks: sums of segments, then the loss of each row from them
// Backward        rows split over blocks
// One pass        a row that fits stays in the shared memory of a block, or of a cluster of blocks,
//                 between its sums and its gradient: up to about 1.7 million 16-bit logits on an
//                 H100. Longer rows take the passes above, a few rows at a time, so that the second
//                 reading finds them in the L2 cache
//
// Bytes per element, s = size of a logit, t and u = bytes of target and mask (bool 1, sparse about
// 0, float 4): forward s + t + u, backward and one pass 2 s + t + u. Expected limit: memory. Not
// measured on a GPU yet.
//
// How rows are split depends on shapes alone, and losses of rows are added up in a fixed order.
// Only the way that the one pass takes depends on the GPU: on its shared memory, its clusters and
// how many multiprocessors there are to be filled. Each way gives the same bits every time; two
// ways round differently.
#pragma once
#include <cstdint>
#include <limits>

#include "cuda/entries.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/tiles.cuh"
#include "cuda/vector.cuh"
#include "math/multilabel_categorical_crossentropy.h"
#include "math/reduction.h"
#include "problem.h"

namespace mlloss::cuda {

// ---- Sums of exponentials ----
// While a sum is being collected, `largest` is the largest value so far, no less and no more than
// what is finite, so that differences to it are never inf - inf.

template <class Real>
constexpr Real kMost = std::numeric_limits<Real>::max();

template <class Real>
__device__ __forceinline__ RowSums<Real> no_sums() {
  return {{-kMost<Real>, Real(0)}, {-kMost<Real>, Real(0)}};
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double smaller(double a, double b) { return fmin(a, b); }

// e^x for x <= 0. Rounding x log2(e) makes a relative error of 2^-24 |x|: little where a term
// counts among others, of which one is e^0.
__device__ __forceinline__ float exp_of_term(float x) { return exp2_approx(x * 1.44269504f); }
__device__ __forceinline__ double exp_of_term(double x) { return exp_nonpositive(x); }

// The sum of a few numbers, pair by pair.
template <class Real, int kCount>
__device__ __forceinline__ Real sum_of(const Real (&values)[kCount]) {
  Real sums[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = values[i];
#pragma unroll
  for (int stride = 1; stride < kCount; stride *= 2) {
#pragma unroll
    for (int i = 0; i + stride < kCount; i += 2 * stride) sums[i] += sums[i + stride];
  }
  return sums[0];
}

// Lets a sum be relative to the largest of a vector's values as well; returns what they are
// relative to. -inf stands for no value.
template <class Real, int kCount>
__device__ __forceinline__ Real raise(ScaledSum<Real>& sum, const Real (&values)[kCount]) {
  Real largest = sum.largest;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = larger(largest, values[i]);
  largest = smaller(largest, kMost<Real>);
  sum.sum *= exp_of_term(sum.largest - largest);
  sum.largest = largest;
  return largest;
}

// Adds e^value.
template <class Real, int kCount>
__device__ __forceinline__ void add_exponentials(ScaledSum<Real>& sum,
                                                 const Real (&values)[kCount]) {
  const Real largest = raise(sum, values);
  Real terms[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) terms[i] = exp_of_term(values[i] - largest);
  sum.sum += sum_of(terms);
}

// Adds factor * e^value. Elements with factor 0 are not looked at.
template <class Real, int kCount>
__device__ __forceinline__ void add_exponentials(ScaledSum<Real>& sum, const Real (&logits)[kCount],
                                                 const Real (&factors)[kCount]) {
  Real values[kCount], terms[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = factors[i] != 0 ? logits[i] : -kInfinity<Real>;
  const Real largest = raise(sum, values);
#pragma unroll
  for (int i = 0; i < kCount; ++i) terms[i] = factors[i] * exp_of_term(values[i] - largest);
  sum.sum += sum_of(terms);
}

// Adds the elements of a vector to the sums of its row.
template <bool kSoft, class Scalar, class Real, int kCount>
__device__ __forceinline__ void add_vector(RowSums<Real>& sums,
                                           const Vector<Scalar, kCount>& logits,
                                           const VectorLabels<Real, kCount>& labels) {
  Real x[kCount];
  unpack(logits, x);
  if constexpr (kSoft) {
    Real minus_x[kCount], positive[kCount], negative[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      minus_x[i] = -x[i];
      const bool observed = labels.observed >> i & 1u;
      positive[i] = observed ? labels.target[i] : Real(0);
      negative[i] = observed ? 1 - labels.target[i] : Real(0);
    }
    add_exponentials(sums.positive, minus_x, positive);
    add_exponentials(sums.negative, x, negative);
  } else {
    const uint32_t negatives = labels.observed & ~labels.positive;
    const uint32_t positives = labels.observed & labels.positive;
    Real values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = negatives & 1u << i ? x[i] : -kInfinity<Real>;
    }
    add_exponentials(sums.negative, values);
    // Among many labels few are positive: most threads skip their side.
    if (positives == 0) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = positives & 1u << i ? -x[i] : -kInfinity<Real>;
    }
    add_exponentials(sums.positive, values);
  }
}

// The sums of `width` neighbouring lanes, a power of two, in all of them.
template <class Real>
__device__ __forceinline__ RowSums<Real> lanes_sums(const RowSums<Real>& own, int width) {
  RowSums<Real> all = own;
  for (int lanes = width / 2; lanes > 0; lanes /= 2) {
    all.positive.largest =
        larger(all.positive.largest, __shfl_xor_sync(kWholeWarp, all.positive.largest, lanes));
    all.negative.largest =
        larger(all.negative.largest, __shfl_xor_sync(kWholeWarp, all.negative.largest, lanes));
  }
  all.positive.sum *= exp_of_term(own.positive.largest - all.positive.largest);
  all.negative.sum *= exp_of_term(own.negative.largest - all.negative.largest);
  for (int lanes = width / 2; lanes > 0; lanes /= 2) {
    all.positive.sum += __shfl_xor_sync(kWholeWarp, all.positive.sum, lanes);
    all.negative.sum += __shfl_xor_sync(kWholeWarp, all.negative.sum, lanes);
  }
  return all;
}

constexpr int kMostWarps = 32;

// The sums of a block, in all of its threads: one exchange, with one barrier. `warps` is in shared
// memory, [2][kMostWarps]; consecutive calls use its halves in turn, so that none overwrites what
// others still read.
template <class Real>
__device__ __forceinline__ RowSums<Real> block_sums(const RowSums<Real>& own, RowSums<Real>* warps,
                                                    int turn) {
  RowSums<Real>* place = warps + turn % 2 * kMostWarps;
  const RowSums<Real> warp_sums = lanes_sums(own, 32);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) place[threadIdx.x / 32] = warp_sums;
  __syncthreads();
  const bool exists = lane < static_cast<int>(blockDim.x) / 32;
  return lanes_sums(exists ? place[lane] : no_sums<Real>(), 32);
}

// ---- From sums to losses and gradients ----

// The constant weight of a row: NaN where negative.
template <class Real>
__device__ __forceinline__ Real row_weight(const RowwiseProblem& problem, int64_t row) {
  const Strided& weight = problem.weight;
  if (weight.data == nullptr) return 1;
  const Real value = load_one<Real>(weight.data, weight.element, row * weight.row_stride);
  return value < 0 ? kNaN<Real> : value;
}

template <class Real>
__device__ __forceinline__ Real row_threshold(const RowwiseProblem& problem, int64_t row) {
  const Strided& threshold = problem.threshold;
  if (threshold.data == nullptr) return 0;
  return load_one<Real>(threshold.data, threshold.element, row * threshold.row_stride);
}

// Results of a forward pass, per row.
template <class Real>
struct RowResults {
  RowStatistics<Real>* statistics;  // [N]
  double* weighted;                 // [N], weight * loss
  Real* losses;                     // [N], the same for reduction 'none', or nullptr

  // All threads of a row call this, one of them writes. Returns the statistics.
  template <class Loss>
  __device__ __forceinline__ RowStatistics<Real> finish(const RowwiseProblem& problem, int64_t row,
                                                        const RowSums<Real>& sums,
                                                        bool writes) const {
    RowStatistics<Real> result;
    const Real loss =
        Loss::finish(sums.positive, sums.negative, row_threshold<Real>(problem, row), &result);
    if (writes) {
      const double weight = row_weight<double>(problem, row);
      const double own = weight == 0 ? 0 : weight * static_cast<double>(loss);
      statistics[row] = result;
      weighted[row] = own;
      if (losses != nullptr) losses[row] = static_cast<Real>(own);
    }
    return result;
  }
};

// Where a gradient goes and what it is multiplied by.
template <class Scalar>
struct GradientPass {
  using Real = typename Arithmetic<Scalar>::Real;
  Scalar* gradient;  // [N, C], nullptr: no gradient is wanted
  int64_t row_stride;
  Real* threshold;      // [N]
  Strided grad_output;  // no data: 1
  const double* scale;  // 0-d; nullptr: the reciprocal of a denominator that need not be counted

  __device__ __forceinline__ Scalar* row(int64_t row) const { return gradient + row * row_stride; }

  __device__ __forceinline__ double upstream(const RowwiseProblem& problem, int64_t row) const {
    const double factor =
        scale != nullptr
            ? *scale
            : scale_of(denominator_of(problem.reduction, static_cast<double>(problem.rows),
                                      problem.batch, problem.normalizer));
    if (grad_output.data == nullptr) return factor;
    return factor *
           load_one<double>(grad_output.data, grad_output.element, row * grad_output.row_stride);
  }
};

// e^x for x <= 0, to the relative precision of a gradient of this type. For 16 bits, an error of
// 4e-6 where e^x is as small as can be is nothing.
template <class Scalar, class Real>
__device__ __forceinline__ Real exp_for_gradient(Real x) {
  return sizeof(Scalar) == 2 ? exp_of_term(x) : exp_nonpositive(x);
}

// What the gradient of a row is computed with.
template <class Loss, class Scalar>
struct RowGradient {
  using Real = typename Arithmetic<Scalar>::Real;
  RowStatistics<Real> statistics;
  Real scale;
  Real positive_factor, negative_factor;

  __device__ __forceinline__ RowGradient(const RowwiseProblem& problem,
                                         const GradientPass<Scalar>& pass, int64_t row,
                                         const RowStatistics<Real>& statistics)
      : statistics(statistics) {
    const double weight = row_weight<double>(problem, row);
    scale = weight == 0 ? Real(0) : static_cast<Real>(weight * pass.upstream(problem, row));
    positive_factor = -scale * statistics.positive_factor;
    negative_factor = scale * statistics.negative_factor;
  }

  // One thread of each row calls this.
  __device__ __forceinline__ void write_threshold(const RowwiseProblem& problem, int64_t row,
                                                  const GradientPass<Scalar>& pass) const {
    if constexpr (Loss::kHasThreshold) {
      const Real threshold = row_threshold<Real>(problem, row);
      pass.threshold[row] =
          scale == 0 ? Real(0) : scale * Loss::threshold_gradient(statistics, threshold);
    }
  }

  __device__ __forceinline__ Real at_positive(Real x) const {
    return positive_factor * exp_for_gradient<Scalar>(-x - statistics.positive_shift);
  }
  __device__ __forceinline__ Real at_negative(Real x) const {
    return negative_factor * exp_for_gradient<Scalar>(x - statistics.negative_shift);
  }
  // Selected: an infinite logit may meet a factor of 0.
  __device__ __forceinline__ Real at_soft(Real x, Real y) const {
    return (y == 0 ? Real(0) : y * at_positive(x)) + (y == 1 ? Real(0) : (1 - y) * at_negative(x));
  }

  template <bool kSoft, int kCount>
  __device__ __forceinline__ Vector<Scalar, kCount> of(
      const Vector<Scalar, kCount>& logits, const VectorLabels<Real, kCount>& labels) const {
    constexpr uint32_t kAll = (1u << kCount) - 1u;
    Real x[kCount], gradient[kCount];
    unpack(logits, x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gradient[i] = kSoft ? at_soft(x[i], labels.target[i]) : at_negative(x[i]);
    }
    if (!kSoft && labels.positive != 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (labels.positive & 1u << i) gradient[i] = at_positive(x[i]);
      }
    }
    const uint32_t counted = scale == 0 ? 0 : labels.observed;
    if (counted != kAll) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!(counted & 1u << i)) gradient[i] = 0;
      }
    }
    Vector<Scalar, kCount> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) from_real(gradient[i], &result.element[i]);
    return result;
  }
};

// ---- Short rows ----

// Elements of a row that one lane holds, and what a warp holds.
constexpr int kShortPerLane = 32;
constexpr int kShortRow = 32 * kShortPerLane;

// `width` lanes per row. Sums and loss are computed unless the statistics are known already.
template <class Loss, class Scalar, bool kSoft>
__global__ void __launch_bounds__(kThreads, 2)
    rowwise_short(const RowwiseProblem problem, const int width, const bool statistics_known,
                  const RowResults<typename Arithmetic<Scalar>::Real> results,
                  const GradientPass<Scalar> pass) {
  using Window = RowWindow<Scalar, kSoft, LaneGroup>;
  using Real = typename Window::Real;
  constexpr int kVectors = kShortPerLane / Window::kCount;
  constexpr int kValues = kSoft ? kThreads * kShortPerLane : 1;
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kThreads);  // a word of 32 labels per lane
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kThreads);
  MLLOSS_SHARED_ARRAY(typename Window::Bits, values, kValues);

  const LaneGroup group{width};
  const int lane = group.rank();
  const int first_lane = static_cast<int>(threadIdx.x) - lane;
  Window window(problem, group, target_bitmap + first_lane, mask_bitmap + first_lane,
                values + (kSoft ? first_lane * kShortPerLane : 0));
  const int rows = kThreads / width;  // of a block
  for (int64_t block = blockIdx.x; block * rows < problem.rows; block += gridDim.x) {
    const int64_t row = block * rows + first_lane / width;
    const bool exists = row < problem.rows;
    window.start_row(exists ? row : 0, exists);
    window.start_window(0, kShortRow);
    const int vectors = window.vectors();
    typename Window::Logits logits[kVectors];
    typename Window::VectorOfLabels labels[kSoft ? 1 : kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int vector = lane + k * width;
      if (vector < vectors) logits[k] = window.template logits<false>(vector);
    }
    if constexpr (!kSoft) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int vector = lane + k * width;
        if (vector < vectors) labels[k] = window.template labels<false>(vector);
      }
    }
    RowStatistics<Real> statistics;
    if (statistics_known) {
      if (exists) statistics = results.statistics[row];
    } else {
      RowSums<Real> sums = no_sums<Real>();
      uint32_t observed = 0;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int vector = lane + k * width;
        if (vector >= vectors) continue;
        if constexpr (kSoft) labels[0] = window.template labels<false>(vector);
        add_vector<kSoft>(sums, logits[k], labels[kSoft ? 0 : k]);
        observed |= labels[kSoft ? 0 : k].observed;
      }
      if (!window.is_valid() && observed != 0) sums.negative.sum = kNaN<Real>;
      sums = lanes_sums(sums, width);
      if (exists) {
        statistics = results.template finish<Loss>(problem, row, sums, lane == 0);
      }
    }
    if (pass.gradient == nullptr || !exists) continue;
    const RowGradient<Loss, Scalar> own(problem, pass, row, statistics);
    if (lane == 0) own.write_threshold(problem, row, pass);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int vector = lane + k * width;
      if (vector >= vectors) continue;
      if constexpr (kSoft) labels[0] = window.template labels<false>(vector);
      window.template store<false>(vector, own.template of<kSoft>(logits[k], labels[kSoft ? 0 : k]),
                                   pass.row(row));
    }
  }
}

// ---- Rows split over blocks ----

// Vectors of logits that a thread loads before it looks at the first.
template <bool kSoft>
constexpr int kInFlight = kSoft ? 1 : 4;

struct Inner {
  static constexpr bool value = true;
};
struct Edge {
  static constexpr bool value = false;
};

__host__ __device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls use(inner, vector, its logits, its labels) for the vectors of a window that are this
// thread's. The vectors at its ends, which need care, come last. `staged`: take the logits from
// there, by vector.
template <bool kSoft, class Window, class Use>
__device__ __forceinline__ void for_each_vector(const Window& window, int rank, int width,
                                                const typename Window::Logits* staged,
                                                const Use& use) {
  constexpr int kUnroll = kInFlight<kSoft>;
  const int vectors = window.vectors();
  const int last = window.last_inner();
  int vector = rank + window.first_inner();
  for (; vector + (kUnroll - 1) * width < last; vector += kUnroll * width) {
    typename Window::Logits logits[kUnroll];
    typename Window::VectorOfLabels labels[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int place = vector + k * width;
      logits[k] = staged != nullptr ? staged[place] : window.template logits<true>(place);
    }
    window.template labels<true>(vector, width, labels);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) use(Inner{}, vector + k * width, logits[k], labels[k]);
  }
  // The first vector takes the place behind the last.
  for (; vector <= vectors; vector += width) {
    const int place = vector < vectors ? vector : 0;
    use(Edge{}, place, staged != nullptr ? staged[place] : window.template logits<false>(place),
        window.template labels<false>(place));
  }
}

// Adds the vectors of a window to the sums of its row. `staged`: also keeps the logits there.
template <bool kSoft, class Window>
__device__ __forceinline__ void add_window(const Window& window, int rank, int width,
                                           RowSums<typename Window::Real>& sums, uint32_t& observed,
                                           typename Window::Logits* staged = nullptr) {
  for_each_vector<kSoft>(window, rank, width, nullptr,
                         [&](auto, int vector, const auto& logits, const auto& labels) {
                           if (staged != nullptr) staged[vector] = logits;
                           add_vector<kSoft>(sums, logits, labels);
                           observed |= labels.observed;
                         });
}

// Writes the gradients of a window.
template <bool kSoft, class Window, class Gradient, class Scalar>
__device__ __forceinline__ void write_window(const Window& window, int rank, int width,
                                             const Gradient& own, Scalar* row,
                                             const typename Window::Logits* staged = nullptr) {
  for_each_vector<kSoft>(window, rank, width, staged,
                         [&](auto inner, int vector, const auto& logits, const auto& labels) {
                           window.template store<decltype(inner)::value>(
                               vector, own.template of<kSoft>(logits, labels), row);
                         });
}

// Shared memory of a block's window.
#define MLLOSS_SHARED_WINDOW(Window, kSoft)                          \
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kWindow<kSoft> / 32); \
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kWindow<kSoft> / 32);   \
  MLLOSS_SHARED_ARRAY(typename Window::Bits, values, (kSoft ? kWindow<kSoft> : 1))

// The sums of each unit, one per segment of a row, of the rows from `first_row` on.
template <class Scalar, bool kSoft>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Scalar>)
    rowwise_sums(const RowwiseProblem problem, const Units units, const int64_t first_row,
                 RowSums<typename Arithmetic<Scalar>::Real>* __restrict__ sums) {  // [units]
  using Window = RowWindow<Scalar, kSoft, BlockGroup>;
  using Real = typename Window::Real;
  MLLOSS_SHARED_WINDOW(Window, kSoft);
  MLLOSS_SHARED_ARRAY(RowSums<Real>, warps, 2 * kMostWarps);

  const BlockGroup group{kThreads};
  Window window(problem, group, target_bitmap, mask_bitmap, values);
  int turn = 0;
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    window.start_row(first_row + unit / units.per_row);
    const int64_t first = unit % units.per_row * units.width;
    const int64_t last = least(first + units.width, window.positions());
    RowSums<Real> sum = no_sums<Real>();
    uint32_t observed = 0;
    for (int64_t begin = first; begin < last; begin += kWindow<kSoft>) {
      window.start_window(begin, least(begin + kWindow<kSoft>, last));
      add_window<kSoft>(window, group.rank(), kThreads, sum, observed);
    }
    if (!window.is_valid() && observed != 0) sum.negative.sum = kNaN<Real>;
    sum = block_sums(sum, warps, turn++);
    if (threadIdx.x == 0) sums[unit] = sum;
  }
}

// One thread per row: takes the loss from the sums of its segments, combined in order.
template <class Loss, class Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Real>)
    rowwise_finish(const RowwiseProblem problem, const int64_t first_row, const int64_t rows,
                   const int64_t segments,
                   const RowSums<Real>* __restrict__ sums,  // [rows, segments]
                   const RowResults<Real> results) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < rows;
       i += int64_t(gridDim.x) * kThreads) {
    RowSums<Real> sum = sums[i * segments];
    for (int64_t k = i * segments + 1; k < (i + 1) * segments; ++k) {
      sum.positive = combine(sum.positive, sums[k].positive);
      sum.negative = combine(sum.negative, sums[k].negative);
    }
    results.template finish<Loss>(problem, first_row + i, sum, true);
  }
}

// The gradients of the rows from `first_row` on.
template <class Loss, class Scalar, bool kSoft>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Scalar>) rowwise_gradient(
    const RowwiseProblem problem, const Units units, const int64_t first_row,
    const RowStatistics<typename Arithmetic<Scalar>::Real>* __restrict__ statistics,
    const GradientPass<Scalar> pass) {
  using Window = RowWindow<Scalar, kSoft, BlockGroup>;
  MLLOSS_SHARED_WINDOW(Window, kSoft);

  const BlockGroup group{kThreads};
  Window window(problem, group, target_bitmap, mask_bitmap, values);
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const int64_t row = first_row + unit / units.per_row;
    const RowGradient<Loss, Scalar> own(problem, pass, row, statistics[row]);
    if (threadIdx.x == 0 && unit % units.per_row == 0) own.write_threshold(problem, row, pass);
    window.start_row(row);
    const int64_t first = unit % units.per_row * units.width;
    const int64_t last = least(first + units.width, window.positions());
    for (int64_t begin = first; begin < last; begin += kWindow<kSoft>) {
      window.start_window(begin, least(begin + kWindow<kSoft>, last));
      write_window<kSoft>(window, group.rank(), kThreads, own, pass.row(row));
    }
  }
}

// ---- Rows on chip ----

// Blocks of up to this many threads: as many as it takes to keep memory busy when a row leaves room
// for one block on a multiprocessor.
constexpr int kOnChipThreads = 512;

// The sums of a cluster, in all of its threads, from those of its blocks: every warp reads them in
// the order of their ranks, so that all get the same bits. `totals` is in shared memory, [2];
// consecutive calls use its halves in turn, which makes one barrier enough.
template <class Real>
__device__ __forceinline__ RowSums<Real> cluster_sums(const RowSums<Real>& own,
                                                      RowSums<Real>* totals, int turn) {
  RowSums<Real>* place = totals + turn % 2;
  if (threadIdx.x == 0) *place = own;
  cluster_barrier();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return lanes_sums(lane < cluster_blocks() ? load_from_block(place, lane) : no_sums<Real>(), 32);
}

// Loss and gradient of each row by one cluster, mostly of a single block. Each block keeps `width`
// positions of the row in its dynamic shared memory in between. A thread takes the same vectors
// both times, so that no barrier is needed for them.
template <class Loss, class Scalar, bool kSoft>
__global__ void __launch_bounds__(kOnChipThreads, 1)
    rowwise_on_chip(const RowwiseProblem problem, const int64_t width,
                    const RowResults<typename Arithmetic<Scalar>::Real> results,
                    const GradientPass<Scalar> pass) {
  using Window = RowWindow<Scalar, kSoft, BlockGroup>;
  using Real = typename Window::Real;
  MLLOSS_SHARED_WINDOW(Window, kSoft);
  MLLOSS_SHARED_ARRAY(RowSums<Real>, warps, 2 * kMostWarps);
  MLLOSS_SHARED_ARRAY(RowSums<Real>, totals, 2);
  MLLOSS_DYNAMIC_SHARED_ARRAY(uint4, memory);
  auto* staged = reinterpret_cast<typename Window::Logits*>(memory);

  const BlockGroup group{static_cast<int>(blockDim.x)};
  Window window(problem, group, target_bitmap, mask_bitmap, values);
  const int blocks = cluster_blocks();
  const int64_t first = cluster_rank() * width;
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  int turn = 0;
  for (int64_t row = blockIdx.x / blocks; row < problem.rows; row += gridDim.x / blocks) {
    window.start_row(row);
    const int64_t last = least(first + width, window.positions());
    RowSums<Real> sums = no_sums<Real>();
    uint32_t observed = 0;
    for (int64_t begin = first; begin < last; begin += kWindow<kSoft>) {
      window.start_window(begin, least(begin + kWindow<kSoft>, last));
      add_window<kSoft>(window, group.rank(), group.width, sums, observed,
                        staged + (begin - first) / Window::kCount);
    }
    if (!window.is_valid() && observed != 0) sums.negative.sum = kNaN<Real>;
    sums = block_sums(sums, warps, turn);
    if (blocks > 1) sums = cluster_sums(sums, totals, turn);
    ++turn;
    const RowStatistics<Real> statistics =
        results.template finish<Loss>(problem, row, sums, writes);
    const RowGradient<Loss, Scalar> own(problem, pass, row, statistics);
    if (writes) own.write_threshold(problem, row, pass);
    for (int64_t begin = first; begin < last; begin += kWindow<kSoft>) {
      // The labels of a single window are still there.
      if (last - first > kWindow<kSoft>) {
        window.start_window(begin, least(begin + kWindow<kSoft>, last));
      }
      write_window<kSoft>(window, group.rank(), group.width, own, pass.row(row),
                          staged + (begin - first) / Window::kCount);
    }
  }
  // Others may still read this block's sums.
  if (blocks > 1) cluster_barrier();
}

// ---- Rows of which only the listed labels are observed ----

template <class Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Real>)
    rowwise_entries_sums(const RowwiseProblem problem, RowSums<Real>* __restrict__ sums) {  // [N]
  MLLOSS_SHARED_ARRAY(RowSums<Real>, warps, 2 * kMostWarps);
  EntryRow<Real> entries(problem);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    RowSums<Real> sum = no_sums<Real>();
    entries.start(row);
    for (int64_t i = entries.first() + threadIdx.x; i < entries.last(); i += kThreads) {
      if (!entries.counts(i)) continue;
      const Real x = entries.logit(entries.column(i)), y = entries.target(i);
      const Real logit[1] = {x}, minus_logit[1] = {-x}, positive[1] = {y}, negative[1] = {1 - y};
      add_exponentials(sum.positive, minus_logit, positive);
      add_exponentials(sum.negative, logit, negative);
    }
    sum = block_sums(sum, warps, turn++);
    if (threadIdx.x == 0) sums[row] = sum;
  }
}

// Writes the gradients of all observed labels, then 0 everywhere else: the gradient may lie where
// the logits are.
template <class Loss, class Scalar>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Scalar>)
    rowwise_entries_gradient(
        const RowwiseProblem problem,
        const RowStatistics<typename Arithmetic<Scalar>::Real>* __restrict__ statistics,  // [N]
        const GradientPass<Scalar> pass) {
  using Real = typename Arithmetic<Scalar>::Real;
  MLLOSS_SHARED_ARRAY(unsigned, observed, kWindow<false> / 32);
  EntryRow<Real> entries(problem);
  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    const RowGradient<Loss, Scalar> own(problem, pass, row, statistics[row]);
    if (threadIdx.x == 0) own.write_threshold(problem, row, pass);
    Scalar* gradient = pass.row(row);
    entries.start(row);
    for (int64_t i = entries.first() + threadIdx.x; i < entries.last(); i += kThreads) {
      if (!entries.counts(i)) continue;
      const int64_t column = entries.column(i);
      const Real value =
          own.scale == 0 ? Real(0) : own.at_soft(entries.logit(column), entries.target(i));
      from_real(value, gradient + column);
    }
    for (int64_t begin = 0; begin < problem.columns; begin += kWindow<false>) {
      const int width = static_cast<int>(least(kWindow<false>, problem.columns - begin));
      for (int i = threadIdx.x; i < (width + 31) / 32; i += kThreads) observed[i] = 0;
      __syncthreads();
      for (int64_t i = entries.first() + threadIdx.x; i < entries.last(); i += kThreads) {
        const int64_t place = entries.column(i) - begin;
        if (place < 0 || place >= width || !entries.counts(i)) continue;
        atomicOr(&observed[place / 32], 1u << (place % 32));
      }
      __syncthreads();
      for (int i = threadIdx.x; i < width; i += kThreads) {
        if (!(observed[i / 32] >> (i % 32) & 1u)) from_real(Real(0), gradient + begin + i);
      }
      __syncthreads();
    }
  }
}

// ---- The sum over the rows ----

// Adds up losses, and what the reduction counts, of rows in a fixed order. `weighted` may be
// nullptr: the pass that counts before a gradient is written. The only block of a small grid writes
// the result.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    rowwise_total(const RowwiseProblem problem, const double* __restrict__ weighted,  // [N]
                  PartialSum* __restrict__ partial,                                   // [gridDim.x]
                  Real* __restrict__ loss, double* __restrict__ scale) {              // 0-d
  MLLOSS_SHARED_ARRAY(double, warps, kWarps);
  double total = 0, counted = 0;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < problem.rows;
       row += int64_t(gridDim.x) * kThreads) {
    if (weighted != nullptr) total += weighted[row];
    counted += counted_row(problem.reduction, row_weight<double>(problem, row));
  }
  total = block_sum(total, warps);
  counted = block_sum(counted, warps);
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1) {
    partial[blockIdx.x] = {total, counted};
    return;
  }
  const double denominator =
      denominator_of(problem.reduction, counted, problem.batch, problem.normalizer);
  *scale = scale_of(denominator);
  if (problem.reduction != Reduction::kNone) {
    *loss = static_cast<Real>(denominator == 0 ? 0 : total / denominator);
  }
}

// Rows that one block adds up while another kernel could hardly be launched.
constexpr int64_t kRowsOfOneTotal = 16384;

template <class Real>
cudaError_t launch_total(const RowwiseProblem& problem, const double* weighted, PartialSum* partial,
                         const ForwardOutput& output, cudaStream_t stream) {
  const int64_t blocks =
      problem.rows <= kRowsOfOneTotal ? 1 : divide_up(problem.rows, kRowsOfOneTotal / 8);
  const dim3 grid = grid_of(blocks, kReductionBlocks);
  const cudaError_t error =
      MLLOSS_LAUNCH((rowwise_total<Real>), grid, dim3(kThreads), stream, problem, weighted, partial,
                    static_cast<Real*>(output.loss), output.scale);
  if (error != cudaSuccess || grid.x == 1) return error;
  return launch_finish<Real>(problem, partial, grid, output, stream);
}

// ---- Launching ----

// Rows that are read a second time are read while they are in the L2 cache: logits and labels of
// the rows in flight are no more bytes than this part of it. The rest holds what is written, and
// the cache of an A100 or H100 is in halves.
inline int64_t bytes_in_flight() {
  constexpr int kUsual = 40 << 20;
  int device = 0, bytes = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device) == cudaSuccess;
  return (known && bytes > 0 ? bytes : kUsual) / 2;
}

// How one pass keeps a row on chip.
struct OnChip {
  int blocks;     // of a cluster; 0: the row is too long
  int64_t width;  // positions for each of them
  int64_t bytes;  // of the shared memory of each
};

// A larger cluster than a row needs is made of blocks that have at least so much of it: less is
// there before sums have been exchanged.
constexpr int64_t kLeastBytesOnChip = 16 << 10;
// What a block has of a row is a multiple of this, so that no two write to the same cache line of a
// row that is aligned.
constexpr int64_t kCacheLine = 128;

// The smallest cluster whose shared memory holds a row: where there are many rows, fewer exchanges.
// Where there are fewer rows than multiprocessors, as many blocks as these can take. `size`: bytes
// of a position.
inline OnChip on_chip_of(int64_t rows, int64_t positions, int64_t size,
                         const KernelLimits& limits) {
  const auto bytes = [&](int blocks) {
    return divide_up(divide_up(positions * size, blocks), kCacheLine) * kCacheLine;
  };
  int blocks = 1;
  while (bytes(blocks) > limits.shared_bytes) {
    blocks *= 2;
    if (blocks > limits.cluster_blocks) return {};
  }
  while (2 * blocks <= limits.cluster_blocks && 2 * blocks * rows <= limits.multiprocessors &&
         bytes(2 * blocks) >= kLeastBytesOnChip) {
    blocks *= 2;
  }
  return {blocks, bytes(blocks) / size, bytes(blocks)};
}

// Short rows get more lanes than they need until the grid fills a GPU.
constexpr int64_t kLanesWanted = int64_t{1} << 18;

// fp64 has the split kernels for soft targets only: it is there for checks.
template <class Scalar>
constexpr bool kIsChecked = sizeof(Scalar) == 8;

// Bytes of scratch memory that a forward pass needs: partial sums, losses, sums of segments.
inline int64_t rowwise_workspace(const RowwiseProblem& problem) {
  const bool is_double = problem.element == Element::kDouble;
  const int64_t size = is_double ? sizeof(RowSums<double>) : sizeof(RowSums<float>);
  return kReductionBlocks * static_cast<int64_t>(sizeof(PartialSum)) +
         problem.rows * static_cast<int64_t>(sizeof(double)) + units_of(problem).count * size;
}

template <class Real>
struct RowwiseScratch {
  PartialSum* partial;  // [kReductionBlocks]
  RowSums<Real>* sums;  // [units]
  double* weighted;     // [N]

  RowwiseScratch(const RowwiseProblem& problem, void* memory)
      : partial(static_cast<PartialSum*>(memory)),
        sums(reinterpret_cast<RowSums<Real>*>(partial + kReductionBlocks)),
        weighted(reinterpret_cast<double*>(sums + units_of(problem).count)) {}
};

// Lanes per row, or 0 where rows are not short.
template <class Scalar>
int short_width(const RowwiseProblem& problem) {
  const int64_t positions = problem.columns + kWidth<Scalar> - 1;
  if (kIsChecked<Scalar> || problem.columns == 0 || positions > kShortRow) return 0;
  int width = 4;
  while (width * kShortPerLane < positions) width *= 2;
  while (width < 32 && width * kWidth<Scalar> < positions && problem.rows * width < kLanesWanted) {
    width *= 2;
  }
  return width;
}

template <class Loss, class Scalar>
class RowwiseLauncher {
 public:
  using Real = typename Arithmetic<Scalar>::Real;

  RowwiseLauncher(const RowwiseProblem& problem, const GradientPass<Scalar>& pass,
                  cudaStream_t stream)
      : problem_(problem), pass_(pass), stream_(stream) {}

  cudaError_t short_rows(int width, bool statistics_known, const RowResults<Real>& results) const {
    if constexpr (kIsChecked<Scalar>) {
      return cudaErrorInvalidValue;
    } else {
      const dim3 grid = grid_of(divide_up(problem_.rows, kThreads / width), kMaxBlocks);
      return for_targets([&](auto soft) {
        return MLLOSS_LAUNCH((rowwise_short<Loss, Scalar, decltype(soft)::value>), grid,
                             dim3(kThreads), stream_, problem_, width, statistics_known, results,
                             pass_);
      });
    }
  }

  // Sums and losses of `rows` rows.
  cudaError_t losses(int64_t first_row, int64_t rows, RowSums<Real>* sums,
                     const RowResults<Real>& results) const {
    Units units = units_of(problem_);
    units.count = rows * units.per_row;
    cudaError_t error;
    if (problem_.target.format == Format::kObserved) {
      units.per_row = 1;
      error = MLLOSS_LAUNCH((rowwise_entries_sums<Real>), grid_of(rows, kMaxBlocks), dim3(kThreads),
                            stream_, problem_, sums);
    } else {
      error = for_targets([&](auto soft) {
        return MLLOSS_LAUNCH((rowwise_sums<Scalar, decltype(soft)::value>),
                             grid_of(units.count, kMaxBlocks), dim3(kThreads), stream_, problem_,
                             units, first_row, sums);
      });
    }
    if (error != cudaSuccess) return error;
    const dim3 grid = grid_of(divide_up(rows, kThreads), kReductionBlocks);
    return MLLOSS_LAUNCH((rowwise_finish<Loss, Real>), grid, dim3(kThreads), stream_, problem_,
                         first_row, rows, units.per_row, sums, results);
  }

  cudaError_t gradients(int64_t first_row, int64_t rows,
                        const RowStatistics<Real>* statistics) const {
    if (problem_.target.format == Format::kObserved) {
      return MLLOSS_LAUNCH((rowwise_entries_gradient<Loss, Scalar>), grid_of(rows, kMaxBlocks),
                           dim3(kThreads), stream_, problem_, statistics, pass_);
    }
    Units units = units_of(problem_);
    units.count = rows * units.per_row;
    return for_targets([&](auto soft) {
      return MLLOSS_LAUNCH((rowwise_gradient<Loss, Scalar, decltype(soft)::value>),
                           grid_of(units.count, kMaxBlocks), dim3(kThreads), stream_, problem_,
                           units, first_row, statistics, pass_);
    });
  }

  // Losses and gradients together.
  cudaError_t one_pass(RowSums<Real>* sums, const RowResults<Real>& results) const {
    if constexpr (!kIsChecked<Scalar>) {
      if (problem_.target.format != Format::kObserved) {
        const OnChip layout = for_targets([&](auto soft) {
          return on_chip_of(problem_.rows, problem_.columns + kWidth<Scalar> - 1, sizeof(Scalar),
                            on_chip_limits<decltype(soft)::value>());
        });
        if (layout.blocks > 0) return on_chip(layout, results);
      }
    }
    int64_t rows = problem_.rows;
    if (problem_.target.format != Format::kObserved) {
      rows = bytes_in_flight() / (problem_.columns * row_bytes_per_column() + 1);
      if (rows < 1) rows = 1;
    }
    for (int64_t first = 0; first < problem_.rows; first += rows) {
      const int64_t count = least(rows, problem_.rows - first);
      cudaError_t error = losses(first, count, sums, results);
      if (error != cudaSuccess) return error;
      error = gradients(first, count, results.statistics);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

 private:
  template <bool kSoft>
  struct Soft {
    static constexpr bool value = kSoft;
  };

  template <class Run>
  auto for_targets(const Run& run) const {
    if (kIsChecked<Scalar> || needs_soft(problem_)) return run(Soft<true>{});
    return run(Soft<kIsChecked<Scalar>>{});
  }

  // Of logits, targets and mask, about.
  int64_t row_bytes_per_column() const {
    int64_t bytes = sizeof(Scalar);
    if (is_dense(problem_.target)) bytes += needs_soft(problem_) ? 4 : 1;
    if (is_dense(problem_.mask)) bytes += 1;
    return bytes;
  }

  template <bool kSoft>
  static KernelLimits on_chip_limits() {
    static KnownLimits limits;
    return limits.of(rowwise_on_chip<Loss, Scalar, kSoft>, kOnChipThreads);
  }

  cudaError_t on_chip(const OnChip& layout, const RowResults<Real>& results) const {
    // A few vectors per thread.
    int threads = 128;
    while (threads < kOnChipThreads && threads * 16 * 8 < layout.bytes) threads *= 2;
    const int64_t clusters = least(problem_.rows, kMaxBlocks / layout.blocks);
    return for_targets([&](auto soft) {
      return MLLOSS_LAUNCH_CLUSTERS((rowwise_on_chip<Loss, Scalar, decltype(soft)::value>),
                                    dim3(static_cast<unsigned>(clusters * layout.blocks)),
                                    dim3(threads), layout.blocks, layout.bytes, stream_, problem_,
                                    layout.width, results, pass_);
    });
  }

  const RowwiseProblem& problem_;
  const GradientPass<Scalar> pass_;
  const cudaStream_t stream_;
};

template <class Real>
RowResults<Real> row_results(const RowwiseProblem& problem, const ForwardOutput& output,
                             const RowwiseScratch<Real>& scratch) {
  const bool per_row = problem.reduction == Reduction::kNone;
  return {static_cast<RowStatistics<Real>*>(output.statistics), scratch.weighted,
          per_row ? static_cast<Real*>(output.loss) : nullptr};
}

// Loss alone.
template <class Loss, class Scalar>
cudaError_t launch_rowwise_losses(const RowwiseProblem& problem, const ForwardOutput& output,
                                  void* workspace, cudaStream_t stream) {
  using Real = typename Arithmetic<Scalar>::Real;
  const RowwiseScratch<Real> scratch(problem, workspace);
  const RowResults<Real> results = row_results(problem, output, scratch);
  const RowwiseLauncher<Loss, Scalar> launcher(problem, {}, stream);
  const int width = problem.target.format == Format::kObserved ? 0 : short_width<Scalar>(problem);
  const cudaError_t error = width > 0 ? launcher.short_rows(width, false, results)
                                      : launcher.losses(0, problem.rows, scratch.sums, results);
  if (error != cudaSuccess) return error;
  return launch_total<Real>(problem, scratch.weighted, scratch.partial, output, stream);
}

// Loss and gradient.
template <class Loss, class Scalar>
cudaError_t launch_rowwise_one_pass(const RowwiseProblem& problem, const ForwardOutput& output,
                                    void* workspace, cudaStream_t stream) {
  using Real = typename Arithmetic<Scalar>::Real;
  const RowwiseScratch<Real> scratch(problem, workspace);
  GradientPass<Scalar> pass{};
  pass.gradient = static_cast<Scalar*>(output.gradient);
  pass.row_stride = problem.row_stride;
  pass.threshold = static_cast<Real*>(output.gradient_threshold);
  pass.grad_output.data = output.gradient_scale;
  pass.grad_output.element = Element::kDouble;
  const bool counts =
      problem.weight.data != nullptr && (problem.reduction == Reduction::kMeanNonzero ||
                                         problem.reduction == Reduction::kWeightedMean);
  if (counts) {
    pass.scale = output.scale;
    const cudaError_t error = launch_total<Real>(problem, nullptr, scratch.partial, output, stream);
    if (error != cudaSuccess) return error;
  }
  const RowResults<Real> results = row_results(problem, output, scratch);
  const RowwiseLauncher<Loss, Scalar> launcher(problem, pass, stream);
  const int width = problem.target.format == Format::kObserved ? 0 : short_width<Scalar>(problem);
  const cudaError_t error = width > 0 ? launcher.short_rows(width, false, results)
                                      : launcher.one_pass(scratch.sums, results);
  if (error != cudaSuccess) return error;
  return launch_total<Real>(problem, scratch.weighted, scratch.partial, output, stream);
}

template <class Loss, class Scalar>
cudaError_t launch_rowwise_forward(const RowwiseProblem& problem, const ForwardOutput& output,
                                   void* workspace, cudaStream_t stream) {
  const bool is_one_pass = output.gradient != nullptr && problem.rows > 0 && problem.columns > 0;
  return is_one_pass ? launch_rowwise_one_pass<Loss, Scalar>(problem, output, workspace, stream)
                     : launch_rowwise_losses<Loss, Scalar>(problem, output, workspace, stream);
}

template <class Loss, class Scalar>
cudaError_t launch_rowwise_backward(const RowwiseProblem& problem, const BackwardInput& input,
                                    const BackwardOutput& output, cudaStream_t stream) {
  using Real = typename Arithmetic<Scalar>::Real;
  if (problem.rows == 0) return cudaSuccess;
  auto* statistics = static_cast<const RowStatistics<Real>*>(input.statistics);
  const GradientPass<Scalar> pass{static_cast<Scalar*>(output.grad_input), problem.columns,
                                  static_cast<Real*>(output.grad_threshold), input.grad_output,
                                  input.scale};
  const RowwiseLauncher<Loss, Scalar> launcher(problem, pass, stream);
  const int width = problem.target.format == Format::kObserved ? 0 : short_width<Scalar>(problem);
  if (width == 0) return launcher.gradients(0, problem.rows, statistics);
  return launcher.short_rows(width, true,
                             {const_cast<RowStatistics<Real>*>(statistics), nullptr, nullptr});
}

}  // namespace mlloss::cuda

// Defines the launchers of a loss, declared in kernels.h, from its formula, a header in math/.
#define MLLOSS_ROWWISE_LAUNCHERS(name, Loss)                                                     \
  namespace mlloss::cuda::name {                                                                 \
  int64_t workspace(const RowwiseProblem& problem) { return rowwise_workspace(problem); }        \
                                                                                                 \
  cudaError_t forward(const RowwiseProblem& problem, const ForwardOutput& output, void* scratch, \
                      cudaStream_t stream) {                                                     \
    return dispatch_logits(problem.element, [&](auto scalar) {                                   \
      using Scalar = typename decltype(scalar)::Type;                                            \
      return launch_rowwise_forward<Loss, Scalar>(problem, output, scratch, stream);             \
    });                                                                                          \
  }                                                                                              \
                                                                                                 \
  cudaError_t backward(const RowwiseProblem& problem, const BackwardInput& input,                \
                       const BackwardOutput& output, cudaStream_t stream) {                      \
    return dispatch_logits(problem.element, [&](auto scalar) {                                   \
      using Scalar = typename decltype(scalar)::Type;                                            \
      return launch_rowwise_backward<Loss, Scalar>(problem, input, output, stream);              \
    });                                                                                          \
  }                                                                                              \
  }
