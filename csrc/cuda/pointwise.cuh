// Forward and backward kernels of any loss that is a sum over elements; the loss is a header in
// math/, the same one that the CPU loops use.
//
// Bytes per element, s = size of a logit, t and u = bytes of target and mask (bool 1, sparse about
// 0, float 4): forward s + t + u, backward 2 s + t + u. Expected limit: memory. Not measured on a
// GPU yet.
#pragma once
#include <cstdint>

#include "cuda/reduce.cuh"
#include "cuda/tiles.cuh"
#include "cuda/vector.cuh"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss::cuda {

// What a kernel is specialised for. The first four have no weights and reduce; kGeneral does all.
enum class Mode { kHard, kHardMasked, kSoft, kSoftMasked, kGeneral };

constexpr bool is_soft(Mode mode) { return mode != Mode::kHard && mode != Mode::kHardMasked; }
constexpr bool is_masked(Mode mode) { return mode != Mode::kHard && mode != Mode::kSoft; }

// The constants of a vector: mask * weight (0 where masked, NaN where negative) and pos_weight.
template <class Real, int kCount>
__device__ __forceinline__ void load_constants(const PointwiseProblem& problem, int64_t row,
                                               int64_t column, Extent extent, uint32_t observed,
                                               Real (&factor)[kCount], Real (&pos_weight)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) factor[i] = pos_weight[i] = 1;
  const auto load = [&](const Strided& array, Real(&out)[kCount]) {
    if (array.data == nullptr) return;
    load_any(array.data, array.element, row * array.row_stride + column * array.column_stride,
             array.column_stride, extent, out);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = out[i] < 0 ? kNaN<Real> : out[i];
  };
  load(problem.weight, factor);
  load(problem.pos_weight, pos_weight);
#pragma unroll
  for (int i = 0; i < kCount; ++i) factor[i] = observed >> i & 1u ? factor[i] : Real(0);
}

// Partial sums of S and of the denominator, one per block; with `losses` the terms are written too.
template <class Loss, class Scalar, Mode kMode>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    pointwise_forward(const PointwiseProblem problem, const Loss loss, const Units units,
                      typename Loss::Real* __restrict__ losses,  // [N, C] or nullptr
                      PartialSum* __restrict__ partial) {        // [gridDim.x]
  using Real = typename Loss::Real;
  constexpr int kCount = kWidth<Scalar>;
  constexpr int kUnroll =
      is_soft(kMode) ? 1 : kPerThread / kCount;  // reading any dtype is long code
  using Tiles = LabelTiles<Real, kCount, is_soft(kMode)>;
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kTileWidth / 32);
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kTileWidth / 32);
  MLLOSS_SHARED_ARRAY(typename Tiles::Bits, values, (SharedLabels<Real, is_soft(kMode)>::kValues));
  MLLOSS_SHARED_ARRAY(double, warps, kWarps);

  Tiles labels(problem, target_bitmap, mask_bitmap, values);
  double total = 0, denominator = 0;
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const Segment<Scalar> segment(problem, units, unit);
    labels.start_row(segment.row, segment.shift);
    for (int64_t begin = segment.begin; begin < segment.end; begin += kTileWidth) {
      labels.start_tile(begin);
      // Over the thread's elements of a tile: log1p(q) is the sum of their logarithms.
      Real q = 0, linear = 0;
#pragma unroll kUnroll
      for (int k = 0; k < kPerThread / kCount; ++k) {
        const int offset = (k * kThreads + static_cast<int>(threadIdx.x)) * kCount;
        const int64_t column = begin + offset - segment.shift;
        const Extent extent = extent_of<kCount>(column, problem.columns);
        if (extent.first >= extent.last) continue;
        Real x[kCount];
        // An element outside of the row is a confident negative, whose loss is 0.
        load_logits(segment.logits, column, extent, -kInfinity<Real>, x);
        const VectorLabels<Real, kCount> vector = labels.vector(offset, extent);
        const uint32_t observed = vector.observed;
        if (!labels.is_valid()) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) x[i] = kNaN<Real>;
        }
        if constexpr (kMode == Mode::kGeneral) {
          Real factor[kCount], pos_weight[kCount];
          load_constants(problem, segment.row, column, extent, observed, factor, pos_weight);
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const Real y = loss.smoothed(vector.target[i]);
            const Real value =
                factor[i] == 0 ? Real(0) : factor[i] * loss.loss(x[i], y, pos_weight[i]);
            if (losses != nullptr && extent.holds(i)) {
              losses[segment.row * problem.columns + column + i] = value;
            }
            total += value;
            if (problem.reduction == Reduction::kMeanNonzero) denominator += factor[i] != 0 ? 1 : 0;
            if (problem.reduction == Reduction::kWeightedMean) denominator += factor[i];
          }
        } else {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            Real z = x[i], part;
            if constexpr (is_soft(kMode)) {
              part = loss.linear_part(z, loss.smoothed(vector.target[i]));
            } else {
              // With the sign of positives flipped, every element is a negative.
              z = vector.positive >> i & 1u ? -z : z;
              part = positive_part(z);
            }
            Real e = exp_nonpositive(-absolute(z));
            if (is_masked(kMode) || is_soft(kMode)) {
              e = observed >> i & 1u ? e : Real(0);
              part = observed >> i & 1u ? part : Real(0);
            }
            q = q * e + (q + e);
            linear += part;
          }
        }
        if (kMode != Mode::kGeneral || problem.reduction == Reduction::kMean) {
          denominator += __popc(observed);
        }
      }
      if constexpr (kMode != Mode::kGeneral) total += linear + log1p_nonnegative(q);
    }
  }
  total = block_sum(total, warps);
  denominator = block_sum(denominator, warps);
  if (threadIdx.x == 0) partial[blockIdx.x] = {total, denominator};
}

template <class Loss, class Scalar, Mode kMode>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    pointwise_backward(const PointwiseProblem problem, const Loss loss, const Units units,
                       const BackwardInput input, Scalar* __restrict__ grad_input) {  // [N, C]
  using Real = typename Loss::Real;
  constexpr int kCount = kWidth<Scalar>;
  constexpr int kUnroll =
      is_soft(kMode) ? 1 : kPerThread / kCount;  // reading any dtype is long code
  using Tiles = LabelTiles<Real, kCount, is_soft(kMode)>;
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kTileWidth / 32);
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kTileWidth / 32);
  MLLOSS_SHARED_ARRAY(typename Tiles::Bits, values, (SharedLabels<Real, is_soft(kMode)>::kValues));

  Tiles labels(problem, target_bitmap, mask_bitmap, values);
  const Strided& grad_output = input.grad_output;
  const bool uniform = grad_output.row_stride == 0 && grad_output.column_stride == 0;
  Real scale = static_cast<Real>(*input.scale);
  if (uniform) {
    scale = static_cast<Real>(*input.scale *
                              load_one<double>(grad_output.data, grad_output.element, 0));
  }
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const Segment<Scalar> segment(problem, units, unit);
    Scalar* gradient_row = grad_input + segment.row * problem.columns;
    labels.start_row(segment.row, segment.shift);
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
        if (!labels.is_valid()) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) x[i] = kNaN<Real>;
        }
        if constexpr (is_soft(kMode)) {
          Real factor[kCount], pos_weight[kCount], upstream[kCount];
#pragma unroll
          for (int i = 0; i < kCount; ++i) upstream[i] = 1;
          if constexpr (kMode == Mode::kGeneral) {
            load_constants(problem, segment.row, column, extent, vector.observed, factor,
                           pos_weight);
            if (!uniform) {
              load_any(grad_output.data, grad_output.element,
                       segment.row * grad_output.row_stride + column * grad_output.column_stride,
                       grad_output.column_stride, extent, upstream);
            }
          } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              factor[i] = vector.observed >> i & 1u ? Real(1) : Real(0);
              pos_weight[i] = 1;
            }
          }
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const Real y = loss.smoothed(vector.target[i]);
            const Real value =
                scale * factor[i] * upstream[i] * loss.gradient(x[i], y, pos_weight[i]);
            gradient[i] = factor[i] == 0 ? Real(0) : value;
          }
        } else {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const bool is_positive = vector.positive >> i & 1u;
            const Real z = is_positive ? -x[i] : x[i];
            const Real value = scale * sigmoid_pair(z, exp_nonpositive(-absolute(z))).p;
            gradient[i] = is_positive ? -value : value;
            if constexpr (is_masked(kMode)) {
              gradient[i] = vector.observed >> i & 1u ? gradient[i] : Real(0);
            }
          }
        }
        store_gradients(gradient_row, column, extent, gradient);
      }
    }
  }
}

// ---- Launching ----

inline Mode mode_of(const PointwiseProblem& problem, bool keeps_hard_targets, bool per_element) {
  if (per_element || problem.weight.data != nullptr || problem.pos_weight.data != nullptr) {
    return Mode::kGeneral;
  }
  const bool masked = problem.mask.data != nullptr || problem.has_ignored;
  if (needs_soft(problem) || !keeps_hard_targets) return masked ? Mode::kSoftMasked : Mode::kSoft;
  return masked ? Mode::kHardMasked : Mode::kHard;
}

template <Mode kMode>
struct ModeConstant {
  static constexpr Mode value = kMode;
};

// Calls run(ModeConstant<mode>). fp64 has the general kernel only: it is there for checks.
template <class Scalar, class Run>
cudaError_t dispatch_mode(Mode mode, const Run& run) {
  if constexpr (sizeof(Scalar) < 8) {
    switch (mode) {
      case Mode::kHard:
        return run(ModeConstant<Mode::kHard>{});
      case Mode::kHardMasked:
        return run(ModeConstant<Mode::kHardMasked>{});
      case Mode::kSoft:
        return run(ModeConstant<Mode::kSoft>{});
      case Mode::kSoftMasked:
        return run(ModeConstant<Mode::kSoftMasked>{});
      case Mode::kGeneral:
        break;
    }
  }
  return run(ModeConstant<Mode::kGeneral>{});
}

// Bytes of scratch memory that a forward pass needs.
constexpr int64_t kPointwiseWorkspace = kReductionBlocks * sizeof(PartialSum);

template <class Loss, class Scalar>
cudaError_t launch_pointwise_forward(PointwiseProblem problem, const Loss& loss,
                                     const ForwardOutput& output, void* workspace,
                                     cudaStream_t stream) {
  using Real = typename Loss::Real;
  flatten(problem, nullptr);
  const Units units = units_of(problem);
  const dim3 grid = grid_of(units.count, kReductionBlocks);
  auto* partial = static_cast<PartialSum*>(workspace);
  const bool per_element = problem.reduction == Reduction::kNone;
  auto* losses = per_element ? static_cast<Real*>(output.loss) : nullptr;
  const auto run = [&](auto mode) {
    constexpr Mode kMode = decltype(mode)::value;
    return MLLOSS_LAUNCH((pointwise_forward<Loss, Scalar, kMode>), grid, dim3(kThreads), stream,
                         problem, loss, units, losses, partial);
  };
  const cudaError_t error =
      dispatch_mode<Scalar>(mode_of(problem, loss.keeps_hard_targets(), per_element), run);
  if (error != cudaSuccess) return error;
  return launch_finish<Real>(problem, partial, grid, output, stream);
}

template <class Loss, class Scalar>
cudaError_t launch_pointwise_backward(PointwiseProblem problem, const Loss& loss,
                                      const BackwardInput& input, const BackwardOutput& output,
                                      cudaStream_t stream) {
  // Nothing to write; grad_output may have no memory.
  if (problem.rows == 0 || problem.columns == 0) return cudaSuccess;
  flatten(problem, &input.grad_output);
  const Units units = units_of(problem);
  const bool per_element =
      input.grad_output.row_stride != 0 || input.grad_output.column_stride != 0;
  const auto run = [&](auto mode) {
    constexpr Mode kMode = decltype(mode)::value;
    return MLLOSS_LAUNCH((pointwise_backward<Loss, Scalar, kMode>),
                         grid_of(units.count, kMaxBlocks), dim3(kThreads), stream, problem, loss,
                         units, input, static_cast<Scalar*>(output.grad_input));
  };
  return dispatch_mode<Scalar>(mode_of(problem, loss.keeps_hard_targets(), per_element), run);
}

}  // namespace mlloss::cuda
