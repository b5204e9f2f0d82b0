// Forward and backward kernels of losses that are a function of two sums over a row: of e^-x over
// its positives and of e^x over its negatives. See math/multilabel_categorical_crossentropy.h.
//
// Bytes per element, s = size of a logit, t and u = bytes of target and mask (bool 1, sparse about
// 0, float 4): forward s + t + u, backward 2 s + t + u. Expected limit: memory. Not measured on a
// GPU yet.
#pragma once
#include <cstdint>

#include "cuda/entries.cuh"
#include "cuda/reduce.cuh"
#include "cuda/tiles.cuh"
#include "cuda/vector.cuh"
#include "math/multilabel_categorical_crossentropy.h"
#include "problem.h"

namespace mlloss::cuda {

// Adds factor * e^value of a vector's elements; those with factor 0 are not looked at. The largest
// value so far is what the sum is relative to: when it grows, the sum is brought along.
template <class Real, int kCount>
__device__ __forceinline__ void add_exponentials(ScaledSum<Real>& sum, const Real (&values)[kCount],
                                                 const Real (&factors)[kCount]) {
  Real largest = sum.largest;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (factors[i] != 0 && values[i] > largest) largest = values[i];
  }
  const Real shift = shift_of(largest);
  // A sum of 0 stays 0: its factor may overflow, since its maximum is -inf.
  if (sum.sum != 0) sum.sum *= exp_nonpositive(shift_of(sum.largest) - shift);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (factors[i] != 0) sum.sum += factors[i] * exp_nonpositive(values[i] - shift);
  }
  sum.largest = largest;
}

template <class Real>
__device__ __forceinline__ ScaledSum<Real> shuffle_sum(ScaledSum<Real> sum, int lanes) {
  return {__shfl_xor_sync(kFullWarp, sum.largest, lanes),
          __shfl_xor_sync(kFullWarp, sum.sum, lanes)};
}

// The sums of each unit, one per segment of a row.
template <class Scalar, bool kSoft>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Scalar>)
    rowwise_sums(const RowwiseProblem problem, const Units units,
                 RowSums<typename Arithmetic<Scalar>::Real>* __restrict__ sums) {  // [units]
  using Real = typename Arithmetic<Scalar>::Real;
  constexpr int kCount = kWidth<Scalar>;
  constexpr int kUnroll = kSoft ? 1 : kPerThread / kCount;  // reading any dtype is long code
  using Tiles = LabelTiles<Real, kCount, kSoft>;
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(typename Tiles::Bits, values, (SharedLabels<Real, kSoft>::kValues));
  MLLOSS_SHARED_ARRAY(ScaledSum<Real>, warps, kWarps);

  Tiles labels(problem, target_bitmap, mask_bitmap, values);
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const Segment<Scalar> segment(problem, units, unit);
    labels.start_row(segment.row, segment.shift);
    RowSums<Real> sum = RowSums<Real>::empty();
    for (int64_t begin = segment.begin; begin < segment.end; begin += kTileWidth) {
      labels.start_tile(begin);
#pragma unroll kUnroll
      for (int k = 0; k < kPerThread / kCount; ++k) {
        const int offset = (k * kThreads + static_cast<int>(threadIdx.x)) * kCount;
        const int64_t column = begin + offset - segment.shift;
        const Extent extent = extent_of<kCount>(column, problem.columns);
        if (extent.first >= extent.last) continue;
        Real x[kCount], minus_x[kCount], positive[kCount], negative[kCount];
        load_logits(segment.logits, column, extent, Real(0), x);
        const VectorLabels<Real, kCount> vector = labels.vector(offset, extent);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (!labels.is_valid()) x[i] = kNaN<Real>;
          minus_x[i] = -x[i];
          const bool observed = vector.observed >> i & 1u;
          const bool is_positive = vector.positive >> i & 1u;
          const Real y = kSoft ? vector.target[i] : is_positive ? Real(1) : Real(0);
          positive[i] = observed ? y : Real(0);
          negative[i] = observed ? 1 - y : Real(0);
        }
        // Among many labels few are positive: most threads skip their side.
        if (kSoft || (vector.positive & vector.observed) != 0) {
          add_exponentials(sum.positive, minus_x, positive);
        }
        add_exponentials(sum.negative, x, negative);
      }
    }
    const auto merge = [](ScaledSum<Real> a, ScaledSum<Real> b) { return combine(a, b); };
    const auto shuffle = [](ScaledSum<Real> a, int lanes) { return shuffle_sum(a, lanes); };
    sum.positive = block_reduce(sum.positive, warps, merge, shuffle);
    sum.negative = block_reduce(sum.negative, warps, merge, shuffle);
    if (threadIdx.x == 0) sums[unit] = sum;
  }
}

// The sums of each row of which only the listed labels are observed.
template <class Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Real>)
    rowwise_entries_sums(const RowwiseProblem problem, RowSums<Real>* __restrict__ sums) {  // [N]
  MLLOSS_SHARED_ARRAY(ScaledSum<Real>, warps, kWarps);
  EntryRow<Real> entries(problem);
  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    RowSums<Real> sum = RowSums<Real>::empty();
    entries.start(row);
    for (int64_t i = entries.first() + threadIdx.x; i < entries.last(); i += kThreads) {
      if (!entries.counts(i)) continue;
      const Real x = entries.logit(entries.column(i)), y = entries.target(i);
      const Real logit[1] = {x}, minus_logit[1] = {-x}, positive[1] = {y}, negative[1] = {1 - y};
      add_exponentials(sum.positive, minus_logit, positive);
      add_exponentials(sum.negative, logit, negative);
    }
    const auto merge = [](ScaledSum<Real> a, ScaledSum<Real> b) { return combine(a, b); };
    const auto shuffle = [](ScaledSum<Real> a, int lanes) { return shuffle_sum(a, lanes); };
    sum.positive = block_reduce(sum.positive, warps, merge, shuffle);
    sum.negative = block_reduce(sum.negative, warps, merge, shuffle);
    if (threadIdx.x == 0) sums[row] = sum;
  }
}

// The constant weight of a row: NaN where negative.
template <class Real>
__device__ __forceinline__ Real row_weight(const RowwiseProblem& problem, int64_t row) {
  const Strided& weight = problem.weight;
  if (weight.data == nullptr) return 1;
  const Real value = load_one<Real>(weight.data, weight.element, row * weight.row_stride);
  return value < 0 ? kNaN<Real> : value;
}

__device__ __forceinline__ double row_threshold(const RowwiseProblem& problem, int64_t row) {
  const Strided& threshold = problem.threshold;
  if (threshold.data == nullptr) return 0;
  return load_one<double>(threshold.data, threshold.element, row * threshold.row_stride);
}

// One thread per row: combines its segments in order, takes the loss from the sums, and adds it to
// the partial sum of the block.
template <class Loss, class Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Real>)
    rowwise_finish(const RowwiseProblem problem, const Units units,
                   const RowSums<Real>* __restrict__ sums,        // [N, segments]
                   RowStatistics<Real>* __restrict__ statistics,  // [N]
                   Real* __restrict__ losses,                     // [N] or nullptr
                   PartialSum* __restrict__ partial) {            // [gridDim.x]
  MLLOSS_SHARED_ARRAY(double, warps, kWarps);
  double total = 0, counted = 0;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < problem.rows;
       row += int64_t(gridDim.x) * kThreads) {
    RowSums<double> sum = RowSums<double>::empty();
    for (int64_t i = row * units.per_row; i < (row + 1) * units.per_row; ++i) {
      const RowSums<Real> part = sums[i];
      sum.positive =
          combine(sum.positive, ScaledSum<double>{part.positive.largest, part.positive.sum});
      sum.negative =
          combine(sum.negative, ScaledSum<double>{part.negative.largest, part.negative.sum});
    }
    const double loss =
        Loss::finish(sum.positive, sum.negative, row_threshold(problem, row), statistics + row);
    const double weight = row_weight<double>(problem, row);
    const double weighted = weight == 0 ? 0 : weight * loss;
    if (losses != nullptr) losses[row] = static_cast<Real>(weighted);
    total += weighted;
    counted += counted_row(problem.reduction, weight);
  }
  total = block_sum(total, warps);
  counted = block_sum(counted, warps);
  if (threadIdx.x == 0) partial[blockIdx.x] = {total, counted};
}

// What the gradient of a row is computed with.
template <class Loss, class Real>
struct RowGradient {
  RowStatistics<Real> statistics;
  Real scale;
  Real positive_factor, negative_factor;

  __device__ __forceinline__ RowGradient(const RowwiseProblem& problem, const BackwardInput& input,
                                         int64_t row) {
    statistics = static_cast<const RowStatistics<Real>*>(input.statistics)[row];
    const double weight = row_weight<double>(problem, row);
    const double upstream = load_one<double>(input.grad_output.data, input.grad_output.element,
                                             row * input.grad_output.row_stride);
    scale = weight == 0 ? Real(0) : static_cast<Real>(weight * upstream * *input.scale);
    positive_factor = -scale * statistics.positive_factor;
    negative_factor = scale * statistics.negative_factor;
  }

  // One thread of each row calls this.
  __device__ __forceinline__ void write_threshold(const RowwiseProblem& problem, int64_t row,
                                                  Real* grad_threshold) const {
    if constexpr (Loss::kHasThreshold) {
      const Real threshold = static_cast<Real>(row_threshold(problem, row));
      grad_threshold[row] =
          scale == 0 ? Real(0) : scale * Loss::threshold_gradient(statistics, threshold);
    }
  }

  __device__ __forceinline__ Real at(Real x, bool is_positive) const {
    const Real exponent =
        is_positive ? -x - statistics.positive_shift : x - statistics.negative_shift;
    return (is_positive ? positive_factor : negative_factor) * exp_nonpositive(exponent);
  }

  // Selected: an infinite logit may meet a factor of 0.
  __device__ __forceinline__ Real at_soft(Real x, Real y) const {
    const Real positive = y * exp_nonpositive(-x - statistics.positive_shift);
    const Real negative = (1 - y) * exp_nonpositive(x - statistics.negative_shift);
    return (y == 0 ? Real(0) : positive_factor * positive) +
           (y == 1 ? Real(0) : negative_factor * negative);
  }
};

template <class Loss, class Scalar, bool kSoft>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Scalar>)
    rowwise_backward(const RowwiseProblem problem, const Units units, const BackwardInput input,
                     Scalar* __restrict__ grad_input,                                   // [N, C]
                     typename Arithmetic<Scalar>::Real* __restrict__ grad_threshold) {  // [N]
  using Real = typename Arithmetic<Scalar>::Real;
  constexpr int kCount = kWidth<Scalar>;
  constexpr int kUnroll = kSoft ? 1 : kPerThread / kCount;  // reading any dtype is long code
  using Tiles = LabelTiles<Real, kCount, kSoft>;
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(typename Tiles::Bits, values, (SharedLabels<Real, kSoft>::kValues));

  Tiles labels(problem, target_bitmap, mask_bitmap, values);
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const Segment<Scalar> segment(problem, units, unit);
    const int64_t row = segment.row;
    const RowGradient<Loss, Real> own(problem, input, row);
    if (threadIdx.x == 0 && unit % units.per_row == 0) {
      own.write_threshold(problem, row, grad_threshold);
    }
    Scalar* gradient_row = grad_input + row * problem.columns;
    labels.start_row(row, segment.shift);
    for (int64_t begin = segment.begin; begin < segment.end; begin += kTileWidth) {
      labels.start_tile(begin);
#pragma unroll kUnroll
      for (int k = 0; k < kPerThread / kCount; ++k) {
        const int offset = (k * kThreads + static_cast<int>(threadIdx.x)) * kCount;
        const int64_t column = begin + offset - segment.shift;
        const Extent extent = extent_of<kCount>(column, problem.columns);
        if (extent.first >= extent.last) continue;
        Real x[kCount], gradient[kCount];
        load_logits(segment.logits, column, extent, Real(0), x);
        const VectorLabels<Real, kCount> vector = labels.vector(offset, extent);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (!labels.is_valid()) x[i] = kNaN<Real>;
          if constexpr (kSoft) {
            gradient[i] = own.at_soft(x[i], vector.target[i]);
          } else {
            gradient[i] = own.at(x[i], vector.positive >> i & 1u);
          }
          if (own.scale == 0 || !(vector.observed >> i & 1u)) gradient[i] = 0;
        }
        store_gradients(gradient_row, column, extent, gradient);
      }
    }
  }
}

// The same where only the listed labels are observed; `grad_input` [N, C] is 0 before the launch.
template <class Loss, class Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Real>)
    rowwise_entries_backward(const RowwiseProblem problem, const BackwardInput input,
                             void* __restrict__ grad_input,
                             Real* __restrict__ grad_threshold) {  // [N]
  EntryRow<Real> entries(problem);
  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    const RowGradient<Loss, Real> own(problem, input, row);
    if (threadIdx.x == 0) own.write_threshold(problem, row, grad_threshold);
    entries.start(row);
    if (own.scale == 0) continue;
    for (int64_t i = entries.first() + threadIdx.x; i < entries.last(); i += kThreads) {
      if (!entries.counts(i)) continue;
      const int64_t column = entries.column(i);
      store_one(own.at_soft(entries.logit(column), entries.target(i)), grad_input, problem.element,
                row * problem.columns + column);
    }
  }
}

// ---- Launching ----

// Bytes of scratch memory that a forward pass needs: partial sums, sums of segments.
inline int64_t rowwise_workspace(const RowwiseProblem& problem) {
  const bool is_double = problem.element == Element::kDouble;
  const int64_t size = is_double ? sizeof(RowSums<double>) : sizeof(RowSums<float>);
  return kReductionBlocks * static_cast<int64_t>(sizeof(PartialSum)) +
         units_of(problem).count * size;
}

// fp64 has the kernel for soft targets only: it is there for checks.
template <class Scalar>
constexpr bool kHasHardKernel = sizeof(Scalar) < 8;

template <class Loss, class Scalar>
cudaError_t launch_rowwise_forward(const RowwiseProblem& problem, const ForwardOutput& output,
                                   void* workspace, cudaStream_t stream) {
  using Real = typename Arithmetic<Scalar>::Real;
  if (output.gradient != nullptr) return cudaErrorNotSupported;
  Units units = units_of(problem);
  auto* partial = static_cast<PartialSum*>(workspace);                        // [row_grid]
  auto* sums = reinterpret_cast<RowSums<Real>*>(partial + kReductionBlocks);  // [N, segments]
  const dim3 grid = grid_of(units.count, kMaxBlocks);
  cudaError_t error;
  if (problem.target.format == Format::kObserved) {
    units.per_row = 1;
    error = MLLOSS_LAUNCH((rowwise_entries_sums<Real>), grid_of(problem.rows, kMaxBlocks),
                          dim3(kThreads), stream, problem, sums);
  } else if (!kHasHardKernel<Scalar> || needs_soft(problem)) {
    error = MLLOSS_LAUNCH((rowwise_sums<Scalar, true>), grid, dim3(kThreads), stream, problem,
                          units, sums);
  } else {
    error = MLLOSS_LAUNCH((rowwise_sums<Scalar, !kHasHardKernel<Scalar>>), grid, dim3(kThreads),
                          stream, problem, units, sums);
  }
  if (error != cudaSuccess) return error;
  const dim3 row_grid = grid_of((problem.rows + kThreads - 1) / kThreads, kReductionBlocks);
  const bool per_row = problem.reduction == Reduction::kNone;
  error = MLLOSS_LAUNCH((rowwise_finish<Loss, Real>), row_grid, dim3(kThreads), stream, problem,
                        units, sums, static_cast<RowStatistics<Real>*>(output.statistics),
                        per_row ? static_cast<Real*>(output.loss) : nullptr, partial);
  if (error != cudaSuccess) return error;
  return launch_finish<Real>(problem, partial, row_grid, output, stream);
}

template <class Loss, class Scalar>
cudaError_t launch_rowwise_backward(const RowwiseProblem& problem, const BackwardInput& input,
                                    const BackwardOutput& output, cudaStream_t stream) {
  using Real = typename Arithmetic<Scalar>::Real;
  const Units units = units_of(problem);
  if (units.count == 0) return cudaSuccess;
  const dim3 grid = grid_of(units.count, kMaxBlocks);
  auto* grad_input = static_cast<Scalar*>(output.grad_input);
  auto* grad_threshold = static_cast<Real*>(output.grad_threshold);
  if (problem.target.format == Format::kObserved) {
    const int64_t bytes = problem.rows * problem.columns * int64_t(sizeof(Scalar));
    const cudaError_t error = fill_with_zeros(grad_input, bytes, stream);
    if (error != cudaSuccess) return error;
    return MLLOSS_LAUNCH((rowwise_entries_backward<Loss, Real>), grid_of(problem.rows, kMaxBlocks),
                         dim3(kThreads), stream, problem, input, output.grad_input, grad_threshold);
  }
  if (!kHasHardKernel<Scalar> || needs_soft(problem)) {
    return MLLOSS_LAUNCH((rowwise_backward<Loss, Scalar, true>), grid, dim3(kThreads), stream,
                         problem, units, input, grad_input, grad_threshold);
  }
  return MLLOSS_LAUNCH((rowwise_backward<Loss, Scalar, !kHasHardKernel<Scalar>>), grid,
                       dim3(kThreads), stream, problem, units, input, grad_input, grad_threshold);
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
