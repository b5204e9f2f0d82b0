// Rows of which only the listed labels are observed (Format::kObserved): a block per row walks over
// its entries and never over its labels. Loads are scattered, so nothing is vectorised.
//
// A row whose ids rise costs its entries; one that is out of order costs their square, divided by
// the threads of a block, since each entry looks for earlier ones of the same label. Bytes moved: a
// few sectors of 32 bytes per entry; the gradient is zeroed first. Not measured on a GPU yet.
#pragma once
#include <cstdint>

#include "cuda/reduce.cuh"
#include "cuda/tiles.cuh"
#include "cuda/vector.cuh"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss::cuda {

// The entries of one row, for all threads of a block.
template <class Real>
class EntryRow {
 public:
  __device__ __forceinline__ explicit EntryRow(const Problem& problem) : problem_(problem) {}

  // All threads of the block call this. Where the labels of a row cannot be told, its entries are
  // all of its columns, and the targets of those that the mask leaves in are not a number.
  __device__ __forceinline__ void start(int64_t row) {
    row_ = row;
    const Labels& mask = problem_.mask;
    is_valid_ = bounds(problem_.target, first_, last_);
    mask_is_valid_ = mask.format != Format::kSparse || bounds(mask, mask_first_, mask_last_);
    unsigned found = 0;
    for (int64_t i = is_valid_ ? first_ + threadIdx.x : last_; i < last_; i += kThreads) {
      if (column(i) >= problem_.columns) found |= kBadTarget;
      if (i > first_ && key(column(i)) < key(column(i - 1))) found |= kTargetFalls;
    }
    if (mask.format == Format::kSparse && mask_is_valid_) {
      for (int64_t i = mask_first_ + threadIdx.x; i < mask_last_; i += kThreads) {
        if (mask_column(i) >= problem_.columns) found |= kBadMask;
        if (i > mask_first_ && key(mask_column(i)) < key(mask_column(i - 1))) found |= kMaskFalls;
      }
    }
    rises_ = !__syncthreads_or(found & kTargetFalls);
    mask_rises_ = !__syncthreads_or(found & kMaskFalls);
    const bool bad_target = __syncthreads_or(found & kBadTarget);
    const bool bad_mask = __syncthreads_or(found & kBadMask);
    mask_is_valid_ = mask_is_valid_ && !bad_mask;
    is_valid_ = is_valid_ && !bad_target && mask_is_valid_;
    if (is_valid_) return;
    first_ = 0;
    last_ = problem_.columns;
  }

  __device__ __forceinline__ int64_t first() const { return first_; }
  __device__ __forceinline__ int64_t last() const { return last_; }

  __device__ __forceinline__ int64_t column(int64_t i) const {
    return is_valid_ ? index_at(problem_.target.data, problem_.target.element, i) : i;
  }

  // Whether an entry is observed, no padding, and the first of its label.
  __device__ __forceinline__ bool counts(int64_t i) const {
    if (!is_valid_) return !mask_is_valid_ || is_observed(i);
    const int64_t own = column(i);
    if (own < 0 || !is_observed(own)) return false;
    if (rises_) return i == first_ || column(i - 1) != own;
    for (int64_t j = first_; j < i; ++j) {
      if (column(j) == own) return false;
    }
    return true;
  }

  // Whether an entry is observed and no padding, be it the first of its label or not.
  __device__ __forceinline__ bool is_used(int64_t i) const {
    if (!is_valid_) return !mask_is_valid_ || is_observed(i);
    return column(i) >= 0 && is_observed(column(i));
  }

  // The target of an entry that counts: of duplicates the largest, NaN if one of them is invalid.
  __device__ __forceinline__ Real target(int64_t i) const {
    if (!is_valid_) return kNaN<Real>;
    if (problem_.target.values == nullptr) return 1;
    const int64_t own = column(i);
    Real largest = 0;
    for (int64_t j = i; j < last_; ++j) {
      const bool same = column(j) == own;
      if (rises_ && !same) break;
      if (!same) continue;
      const Real value = load_one<Real>(problem_.target.values, problem_.target.values_element, j);
      if (!(value >= 0 && value <= 1)) return kNaN<Real>;
      largest = value > largest ? value : largest;
    }
    return largest;
  }

  __device__ __forceinline__ Real logit(int64_t column) const {
    return load_one<Real>(problem_.logits, problem_.element, row_ * problem_.row_stride + column);
  }

 private:
  __device__ __forceinline__ bool bounds(const Labels& labels, int64_t& first,
                                         int64_t& last) const {
    first = index_at(labels.offsets, labels.element, row_);
    last = index_at(labels.offsets, labels.element, row_ + 1);
    return first >= 0 && first <= last && last <= labels.entries;
  }

  static constexpr unsigned kBadTarget = 1, kBadMask = 2, kTargetFalls = 4, kMaskFalls = 8;

  __device__ __forceinline__ int64_t mask_column(int64_t i) const {
    return index_at(problem_.mask.data, problem_.mask.element, i);
  }

  // What rises in a row in order: padding may stand behind the labels.
  __device__ __forceinline__ static uint64_t key(int64_t column) {
    return static_cast<uint64_t>(column);
  }

  __device__ __forceinline__ bool is_listed(int64_t column) const {
    int64_t first = mask_first_, last = mask_last_;
    while (mask_rises_ && last - first > 1) {
      const int64_t middle = first + (last - first) / 2;
      (key(mask_column(middle)) <= key(column) ? first : last) = middle;
    }
    for (int64_t i = first; i < last; ++i) {
      if (mask_column(i) == column) return true;
    }
    return false;
  }

  __device__ __forceinline__ bool is_observed(int64_t column) const {
    const Labels& mask = problem_.mask;
    if (mask.data == nullptr) return true;
    if (mask.format == Format::kSparse) return is_listed(column);
    if (mask.format == Format::kPacked) {
      const auto* words = static_cast<const uint32_t*>(mask.data) + row_ * mask.row_stride;
      return words[column / 32] >> (column % 32) & 1u;
    }
    return static_cast<const uint8_t*>(
               mask.data)[row_ * mask.row_stride + column * mask.column_stride] != 0;
  }

  const Problem& problem_;
  int64_t row_ = 0;
  int64_t first_ = 0, last_ = 0;
  int64_t mask_first_ = 0, mask_last_ = 0;
  bool rises_ = true, mask_rises_ = true;
  bool is_valid_ = true, mask_is_valid_ = true;
};

// Makes the labels of each row that are not observed 0; the others hold the gradient.
template <class Scalar>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Scalar>)
    zero_unobserved(const Problem problem, Scalar* gradient) {  // [N, C], row stride of the logits
  MLLOSS_SHARED_ARRAY(unsigned, bitmap, kBitmapWords);
  EntryRow<typename Arithmetic<Scalar>::Real> entries(problem);
  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    entries.start(row);
    for (int64_t begin = 0; begin < problem.columns; begin += kBitmapWindow) {
      __syncthreads();  // the previous window has been read
      for (int i = threadIdx.x; i < kBitmapWords; i += kThreads) bitmap[i] = 0;
      __syncthreads();
      for (int64_t i = entries.first() + threadIdx.x; i < entries.last(); i += kThreads) {
        const int64_t place = entries.column(i) - begin;
        if (place < 0 || place >= kBitmapWindow || !entries.is_used(i)) continue;
        atomicOr(&bitmap[place / 32], 1u << (place % 32));
      }
      __syncthreads();
      for (int place = threadIdx.x; place < kBitmapWindow && begin + place < problem.columns;
           place += kThreads) {
        if (bitmap[place / 32] >> (place % 32) & 1u) continue;
        from_real(typename Arithmetic<Scalar>::Real(0),
                  gradient + row * problem.row_stride + begin + place);
      }
    }
  }
}

// ---- Losses that are a sum over elements ----

// The constants of an element: mask * weight and the parameters, not a number where negative.
template <class Loss>
struct EntryConstants {
  using Real = typename Loss::Real;
  Real factor;
  typename Loss::Parameters parameters;

  __device__ __forceinline__ EntryConstants(const PointwiseProblem& problem, int64_t row,
                                            int64_t column) {
    const auto load = [&](const Strided& array) {
      if (array.data == nullptr) return Real(1);
      const Real value = load_one<Real>(array.data, array.element,
                                        row * array.row_stride + column * array.column_stride);
      return value < 0 ? kNaN<Real> : value;
    };
    factor = load(problem.weight);
    for (int k = 0; k < Loss::Parameters::kCount; ++k) {
      parameters.value[k] = load(problem.parameters[k]);
    }
  }
};

__device__ __forceinline__ double smoothed_target(const PointwiseProblem& problem, double y) {
  return problem.label_smoothing / 2 + y * (1 - problem.label_smoothing);
}

// `losses` [N, C] is 0 before the launch, or nullptr.
template <class Loss>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<typename Loss::Real>)
    pointwise_entries_forward(const PointwiseProblem problem, const Loss loss,
                              typename Loss::Real* __restrict__ losses,
                              PartialSum* __restrict__ partial) {  // [gridDim.x]
  using Real = typename Loss::Real;
  MLLOSS_SHARED_ARRAY(double, warps, kWarps);
  EntryRow<Real> entries(problem);
  double total = 0, denominator = 0;
  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    entries.start(row);
    for (int64_t i = entries.first() + threadIdx.x; i < entries.last(); i += kThreads) {
      if (!entries.counts(i)) continue;
      const int64_t column = entries.column(i);
      const EntryConstants<Loss> constants(problem, row, column);
      const Real factor = constants.factor;
      const Real y = static_cast<Real>(smoothed_target(problem, entries.target(i)));
      const Real value =
          factor == 0 ? Real(0)
                      : factor * loss.soft_loss(entries.logit(column), y, constants.parameters);
      if (losses != nullptr) losses[row * problem.columns + column] = value;
      total += value;
      denominator += problem.reduction == Reduction::kMeanNonzero    ? (factor != 0 ? 1 : 0)
                     : problem.reduction == Reduction::kWeightedMean ? static_cast<double>(factor)
                                                                     : 1.0;
    }
  }
  total = block_sum(total, warps);
  denominator = block_sum(denominator, warps);
  if (threadIdx.x == 0) partial[blockIdx.x] = {total, denominator};
}

// Writes the gradient of what is observed to `gradient` [N, C], which may be the logits.
template <class Loss>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<typename Loss::Real>)
    pointwise_entries_backward(const PointwiseProblem problem, const Loss loss,
                               const BackwardInput input, void* gradient,
                               const int64_t row_stride) {
  using Real = typename Loss::Real;
  EntryRow<Real> entries(problem);
  const Strided& grad_output = input.grad_output;
  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    entries.start(row);
    for (int64_t i = entries.first() + threadIdx.x; i < entries.last(); i += kThreads) {
      if (!entries.counts(i)) continue;
      const int64_t column = entries.column(i);
      const EntryConstants<Loss> constants(problem, row, column);
      const double upstream =
          grad_output.data == nullptr
              ? 1.0
              : load_one<double>(grad_output.data, grad_output.element,
                                 row * grad_output.row_stride + column * grad_output.column_stride);
      const Real scale = static_cast<Real>(*input.scale * upstream);
      const Real y = static_cast<Real>(smoothed_target(problem, entries.target(i)));
      const Real value = scale * constants.factor *
                         loss.soft_gradient(entries.logit(column), y, constants.parameters);
      store_one(constants.factor == 0 ? Real(0) : value, gradient, problem.element,
                row * row_stride + column);
    }
  }
}

template <class Loss>
cudaError_t launch_forward_over_entries(const PointwiseProblem& problem,
                                        typename Loss::Real* losses, PartialSum* partial, dim3 grid,
                                        cudaStream_t stream) {
  if (losses != nullptr) {
    const int64_t bytes = problem.rows * problem.columns * int64_t(sizeof(*losses));
    const cudaError_t error = fill_with_zeros(losses, bytes, stream);
    if (error != cudaSuccess) return error;
  }
  return MLLOSS_LAUNCH((pointwise_entries_forward<Loss>), grid, dim3(kThreads), stream, problem,
                       Loss::from(problem), losses, partial);
}

template <class Loss, class Scalar>
cudaError_t launch_backward_over_entries(const PointwiseProblem& problem,
                                         const BackwardInput& input, void* grad_input,
                                         cudaStream_t stream) {
  const int64_t bytes = problem.rows * problem.columns * int64_t(sizeof(Scalar));
  const cudaError_t error = fill_with_zeros(grad_input, bytes, stream);
  if (error != cudaSuccess) return error;
  return MLLOSS_LAUNCH((pointwise_entries_backward<Loss>), grid_of(problem.rows, kMaxBlocks),
                       dim3(kThreads), stream, problem, Loss::from(problem), input, grad_input,
                       problem.columns);
}

// The gradient written over the logits.
template <class Loss, class Scalar>
cudaError_t launch_entries_in_place(const PointwiseProblem& problem, const BackwardInput& input,
                                    void* gradient, cudaStream_t stream) {
  const dim3 grid = grid_of(problem.rows, kMaxBlocks);
  const cudaError_t error =
      MLLOSS_LAUNCH((pointwise_entries_backward<Loss>), grid, dim3(kThreads), stream, problem,
                    Loss::from(problem), input, gradient, problem.row_stride);
  if (error != cudaSuccess) return error;
  return MLLOSS_LAUNCH((zero_unobserved<Scalar>), grid, dim3(kThreads), stream, problem,
                       static_cast<Scalar*>(gradient));
}

}  // namespace mlloss::cuda
