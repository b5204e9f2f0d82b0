// Forward and backward kernels of any loss that is a sum over elements; the loss is a header in
// math/, the same one that the CPU loops use. The common case of sigmoid cross-entropy has faster
// ones, softplus.cuh.
//
// Bytes per element, s = size of a logit, t and u = bytes of target and mask (bool 1, sparse about
// 0, float 4): forward s + t + u, backward 2 s + t + u. Expected limit: memory. Not measured on a
// GPU yet.
#pragma once
#include <cstdint>

#include "cuda/entries.cuh"
#include "cuda/reduce.cuh"
#include "cuda/softplus.cuh"
#include "cuda/tiles.cuh"
#include "cuda/vector.cuh"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss::cuda {

// What a kernel is specialised for. kGeneral does all; the others have no weights and reduce.
enum class Mode { kHard, kSoft, kSoftMasked, kGeneral };

constexpr bool is_soft(Mode mode) { return mode != Mode::kHard; }
constexpr bool is_masked(Mode mode) { return mode != Mode::kSoft; }

// The constants of a vector: mask * weight (0 where masked) and the parameters, all of which are
// not a number where negative.
template <class Parameters, class Real, int kCount>
__device__ __forceinline__ void load_constants(const PointwiseProblem& problem, int64_t row,
                                               int64_t column, Extent extent, uint32_t observed,
                                               Real (&factor)[kCount],
                                               Parameters (&parameters)[kCount]) {
  const auto load = [&](const Strided& array, Real(&out)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = 1;
    if (array.data == nullptr) return;
    load_any(array.data, array.element, row * array.row_stride + column * array.column_stride,
             array.column_stride, extent, out);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = out[i] < 0 ? kNaN<Real> : out[i];
  };
  load(problem.weight, factor);
#pragma unroll
  for (int i = 0; i < kCount; ++i) factor[i] = observed >> i & 1u ? factor[i] : Real(0);
#pragma unroll
  for (int k = 0; k < Parameters::kCount; ++k) {
    Real values[kCount];
    load(problem.parameters[k], values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) parameters[i].value[k] = values[i];
  }
}

// Label smoothing: the target becomes low + y * span.
template <class Real>
struct Smoothing {
  Real low, span;

  __device__ __forceinline__ explicit Smoothing(const PointwiseProblem& problem)
      : low(static_cast<Real>(problem.label_smoothing / 2)),
        span(static_cast<Real>(1 - problem.label_smoothing)) {}

  __device__ __forceinline__ Real operator()(Real y) const { return low + y * span; }
};

// Partial sums of S and of the denominator, one per block; with `losses` the terms are written too.
template <class Loss, class Scalar, Mode kMode>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Scalar>)
    pointwise_forward(const PointwiseProblem problem, const Loss loss, const Units units,
                      typename Loss::Real* __restrict__ losses,  // [N, C] or nullptr
                      PartialSum* __restrict__ partial) {        // [gridDim.x]
  using Real = typename Loss::Real;
  constexpr int kCount = kWidth<Scalar>;
  constexpr int kUnroll =
      is_soft(kMode) ? 1 : kPerThread / kCount;  // reading any dtype is long code
  using Tiles = LabelTiles<Real, kCount, is_soft(kMode)>;
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(typename Tiles::Bits, values, (SharedLabels<Real, is_soft(kMode)>::kValues));
  MLLOSS_SHARED_ARRAY(double, warps, kWarps);

  Tiles labels(problem, target_bitmap, mask_bitmap, values);
  const Smoothing<Real> smoothed(problem);
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
          Real factor[kCount];
          typename Loss::Parameters parameters[kCount];
          load_constants(problem, segment.row, column, extent, observed, factor, parameters);
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const Real y = smoothed(vector.target[i]);
            const Real value =
                factor[i] == 0 ? Real(0) : factor[i] * loss.soft_loss(x[i], y, parameters[i]);
            if (losses != nullptr && extent.holds(i)) {
              losses[segment.row * problem.columns + column + i] = value;
            }
            total += value;
            if (problem.reduction == Reduction::kMeanNonzero) denominator += factor[i] != 0 ? 1 : 0;
            if (problem.reduction == Reduction::kWeightedMean) denominator += factor[i];
          }
        } else if constexpr (!Loss::kIsSoftplus) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const Real value = loss.loss(x[i], vector.positive >> i & 1u, Loss::Parameters::ones());
            linear += observed >> i & 1u ? value : Real(0);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            Real part = Loss::linear_part(x[i], smoothed(vector.target[i]));
            Real e = exp_nonpositive(-absolute(x[i]));
            e = observed >> i & 1u ? e : Real(0);
            part = observed >> i & 1u ? part : Real(0);
            q = q * e + (q + e);
            linear += part;
          }
        }
        if (kMode != Mode::kGeneral || problem.reduction == Reduction::kMean) {
          denominator += __popc(observed);
        }
      }
      if constexpr (kMode != Mode::kGeneral) {
        total += Loss::kIsSoftplus ? linear + log1p_nonnegative(q) : linear;
      }
    }
  }
  total = block_sum(total, warps);
  denominator = block_sum(denominator, warps);
  if (threadIdx.x == 0) partial[blockIdx.x] = {total, denominator};
}

template <class Loss, class Scalar, Mode kMode>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Scalar>)
    pointwise_backward(const PointwiseProblem problem, const Loss loss, const Units units,
                       const BackwardInput input,
                       Scalar* grad_input,  // [N, C]; may be the logits
                       const int64_t grad_row_stride) {
  using Real = typename Loss::Real;
  constexpr int kCount = kWidth<Scalar>;
  constexpr int kUnroll =
      is_soft(kMode) ? 1 : kPerThread / kCount;  // reading any dtype is long code
  using Tiles = LabelTiles<Real, kCount, is_soft(kMode)>;
  MLLOSS_SHARED_ARRAY(unsigned, target_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(unsigned, mask_bitmap, kBitmapWords);
  MLLOSS_SHARED_ARRAY(typename Tiles::Bits, values, (SharedLabels<Real, is_soft(kMode)>::kValues));

  Tiles labels(problem, target_bitmap, mask_bitmap, values);
  const Smoothing<Real> smoothed(problem);
  const Strided& grad_output = input.grad_output;
  const bool uniform = grad_output.row_stride == 0 && grad_output.column_stride == 0;
  Real scale = static_cast<Real>(*input.scale);
  if (uniform && grad_output.data != nullptr) {
    scale = static_cast<Real>(*input.scale *
                              load_one<double>(grad_output.data, grad_output.element, 0));
  }
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const Segment<Scalar> segment(problem, units, unit);
    Scalar* gradient_row = grad_input + segment.row * grad_row_stride;
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
          Real factor[kCount], upstream[kCount];
          typename Loss::Parameters parameters[kCount];
#pragma unroll
          for (int i = 0; i < kCount; ++i) upstream[i] = 1;
          if constexpr (kMode == Mode::kGeneral) {
            load_constants(problem, segment.row, column, extent, vector.observed, factor,
                           parameters);
            if (!uniform) {
              load_any(grad_output.data, grad_output.element,
                       segment.row * grad_output.row_stride + column * grad_output.column_stride,
                       grad_output.column_stride, extent, upstream);
            }
          } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              factor[i] = vector.observed >> i & 1u ? Real(1) : Real(0);
              parameters[i] = Loss::Parameters::ones();
            }
          }
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const Real y = smoothed(vector.target[i]);
            const Real value =
                scale * factor[i] * upstream[i] * loss.soft_gradient(x[i], y, parameters[i]);
            gradient[i] = factor[i] == 0 ? Real(0) : value;
          }
        } else {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const Real value =
                scale * loss.gradient(x[i], vector.positive >> i & 1u, Loss::Parameters::ones());
            gradient[i] = vector.observed >> i & 1u ? value : Real(0);
          }
        }
        store_gradients(gradient_row, column, extent, gradient);
      }
    }
  }
}

// ---- Launching ----

inline Mode mode_of(const PointwiseProblem& problem, bool per_element) {
  if (per_element || problem.weight.data != nullptr || problem.has_parameters()) {
    return Mode::kGeneral;
  }
  if (!needs_soft(problem) && problem.label_smoothing == 0) return Mode::kHard;
  const bool masked = problem.mask.data != nullptr || problem.has_ignored;
  return masked ? Mode::kSoftMasked : Mode::kSoft;
}

template <Mode kMode>
struct ModeConstant {
  static constexpr Mode value = kMode;
};

// Whether a loss has the kernels of softplus.cuh, for problems of mode kHard.
template <class Loss, class Scalar>
constexpr bool kHasSoftplus = Loss::kIsSoftplus && sizeof(Scalar) < 8;

// Calls run(ModeConstant<mode>). fp64 has the general kernel only: it is there for checks. Losses
// whose arithmetic outweighs the reading of labels have two.
template <class Loss, class Scalar, class Run>
cudaError_t dispatch_mode(Mode mode, const Run& run) {
  if constexpr (kHasSoftplus<Loss, Scalar>) {
    if (mode == Mode::kSoft) return run(ModeConstant<Mode::kSoft>{});
    if (mode == Mode::kSoftMasked) return run(ModeConstant<Mode::kSoftMasked>{});
  } else if constexpr (sizeof(Scalar) < 8) {
    if (mode == Mode::kHard) return run(ModeConstant<Mode::kHard>{});
  }
  return run(ModeConstant<Mode::kGeneral>{});
}

// Bytes of scratch memory that a forward pass needs.
constexpr int64_t kPointwiseWorkspace = kReductionBlocks * sizeof(PartialSum);

template <class Loss, class Scalar>
cudaError_t launch_forward_over_tiles(const PointwiseProblem& problem, typename Loss::Real* losses,
                                      PartialSum* partial, dim3 grid, cudaStream_t stream) {
  const Mode mode = mode_of(problem, losses != nullptr);
  if constexpr (kHasSoftplus<Loss, Scalar>) {
    if (mode == Mode::kHard) {
      return launch_softplus<Scalar, Pass::kForward>(problem, {partial}, kReductionBlocks, stream);
    }
  }
  const Units units = units_of(problem);
  const auto run = [&](auto mode) {
    constexpr Mode kMode = decltype(mode)::value;
    return MLLOSS_LAUNCH((pointwise_forward<Loss, Scalar, kMode>), grid, dim3(kThreads), stream,
                         problem, Loss::from(problem), units, losses, partial);
  };
  return dispatch_mode<Loss, Scalar>(mode, run);
}

// `gradient` [N, C], with a row stride; it may be the logits.
template <class Loss, class Scalar>
cudaError_t launch_backward_over_tiles(const PointwiseProblem& problem, const BackwardInput& input,
                                       void* gradient, int64_t row_stride, cudaStream_t stream) {
  const Strided& upstream = input.grad_output;
  const Mode mode = mode_of(problem, upstream.row_stride != 0 || upstream.column_stride != 0);
  if constexpr (kHasSoftplus<Loss, Scalar>) {
    if (mode == Mode::kHard) {
      const SoftplusOutput output{nullptr,     gradient,      row_stride,
                                  input.scale, upstream.data, upstream.element};
      return launch_softplus<Scalar, Pass::kBackward>(problem, output, kMaxBlocks, stream);
    }
  }
  const Units units = units_of(problem);
  const auto run = [&](auto mode) {
    constexpr Mode kMode = decltype(mode)::value;
    return MLLOSS_LAUNCH((pointwise_backward<Loss, Scalar, kMode>),
                         grid_of(units.count, kMaxBlocks), dim3(kThreads), stream, problem,
                         Loss::from(problem), units, input, static_cast<Scalar*>(gradient),
                         row_stride);
  };
  return dispatch_mode<Loss, Scalar>(mode, run);
}

// Loss and gradient in one kernel.
template <class Scalar>
cudaError_t launch_one_pass(const PointwiseProblem& problem, const ForwardOutput& output,
                            PartialSum* partial, cudaStream_t stream) {
  cudaError_t error = launch_scale_of_softplus<Scalar>(problem, partial, output.scale, stream);
  if (error != cudaSuccess) return error;
  const SoftplusOutput results{partial, output.gradient, problem.row_stride, output.scale,
                               output.gradient_scale};
  error = launch_softplus<Scalar, Pass::kOnePass>(problem, results, kReductionBlocks, stream);
  if (error != cudaSuccess) return error;
  const dim3 grid = grid_of(units_of(problem).count, kReductionBlocks);
  return launch_finish<float>(problem, partial, grid, output, stream);
}

// With output.gradient, sigmoid cross-entropy of hard targets takes one pass; others follow with
// their backward pass at once.
template <class Loss, class Scalar>
cudaError_t launch_pointwise_forward(PointwiseProblem problem, const ForwardOutput& output,
                                     void* workspace, cudaStream_t stream) {
  using Real = typename Loss::Real;
  flatten(problem, nullptr);
  auto* partial = static_cast<PartialSum*>(workspace);
  auto* losses = problem.reduction == Reduction::kNone ? static_cast<Real*>(output.loss) : nullptr;
  const bool by_entries = problem.target.format == Format::kObserved;
  const bool wants_gradient = output.gradient != nullptr && problem.rows > 0 && problem.columns > 0;
  if constexpr (kHasSoftplus<Loss, Scalar>) {
    if (wants_gradient && !by_entries && mode_of(problem, false) == Mode::kHard) {
      return launch_one_pass<Scalar>(problem, output, partial, stream);
    }
  }
  const dim3 grid = grid_of(by_entries ? problem.rows : units_of(problem).count, kReductionBlocks);
  cudaError_t error =
      by_entries ? launch_forward_over_entries<Loss>(problem, losses, partial, grid, stream)
                 : launch_forward_over_tiles<Loss, Scalar>(problem, losses, partial, grid, stream);
  if (error != cudaSuccess) return error;
  error = launch_finish<Real>(problem, partial, grid, output, stream);
  if (error != cudaSuccess || !wants_gradient) return error;
  const BackwardInput input{{output.gradient_scale, Element::kDouble, 0, 0}, output.scale, nullptr};
  if (by_entries) {
    return launch_entries_in_place<Loss, Scalar>(problem, input, output.gradient, stream);
  }
  return launch_backward_over_tiles<Loss, Scalar>(problem, input, output.gradient,
                                                  problem.row_stride, stream);
}

template <class Loss, class Scalar>
cudaError_t launch_pointwise_backward(PointwiseProblem problem, const BackwardInput& input,
                                      const BackwardOutput& output, cudaStream_t stream) {
  // Nothing to write; grad_output may have no memory.
  if (problem.rows == 0 || problem.columns == 0) return cudaSuccess;
  flatten(problem, &input.grad_output);
  if (problem.target.format == Format::kObserved) {
    return launch_backward_over_entries<Loss, Scalar>(problem, input, output.grad_input, stream);
  }
  return launch_backward_over_tiles<Loss, Scalar>(problem, input, output.grad_input,
                                                  problem.columns, stream);
}

}  // namespace mlloss::cuda

// Defines the launchers of a loss, declared in kernels.h, from its formula, a header in math/.
#define MLLOSS_POINTWISE_LAUNCHERS(name, Loss)                                                     \
  namespace mlloss::cuda::name {                                                                   \
  int64_t workspace(const PointwiseProblem&) { return kPointwiseWorkspace; }                       \
                                                                                                   \
  cudaError_t forward(const PointwiseProblem& problem, const ForwardOutput& output, void* scratch, \
                      cudaStream_t stream) {                                                       \
    return dispatch_logits(problem.element, [&](auto scalar) {                                     \
      using Scalar = typename decltype(scalar)::Type;                                              \
      using Formula = Loss<typename Arithmetic<Scalar>::Real>;                                     \
      return launch_pointwise_forward<Formula, Scalar>(problem, output, scratch, stream);          \
    });                                                                                            \
  }                                                                                                \
                                                                                                   \
  cudaError_t backward(const PointwiseProblem& problem, const BackwardInput& input,                \
                       const BackwardOutput& output, cudaStream_t stream) {                        \
    return dispatch_logits(problem.element, [&](auto scalar) {                                     \
      using Scalar = typename decltype(scalar)::Type;                                              \
      using Formula = Loss<typename Arithmetic<Scalar>::Real>;                                     \
      return launch_pointwise_backward<Formula, Scalar>(problem, input, output, stream);           \
    });                                                                                            \
  }                                                                                                \
  }
