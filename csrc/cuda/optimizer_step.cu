// One step of an optimizer on the GPU: a single pass over weights, gradient and state.
//
// Bytes per element, s = size of a weight, g = of a gradient: sgd 2 s + g, with momentum 8 more;
// adamw 16 more; adagrad reads a row a second time, from a cache. Expected limit: memory. Not
// measured on a GPU yet.
#include "math/optimizer_step.h"

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace mlloss::cuda {
namespace {

constexpr int kStepThreads = 256;
constexpr int64_t kStepBlocks = 1 << 14;
constexpr int kRowsPerBlock = kStepThreads / 32;  // a warp each

// Elements per thread at a time: 16 bytes of states.
template <class Real>
constexpr int kStepWidth = 16 / sizeof(Real);

template <class Real, int kCount>
__device__ __forceinline__ void store_any(const Real (&values)[kCount], void* data, Element element,
                                          int64_t begin, Extent extent) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (element == Element::kHalf) {
      return store_gradients(static_cast<__half*>(data) + begin, 0, extent, values);
    }
    if (element == Element::kBFloat16) {
      return store_gradients(static_cast<__nv_bfloat16*>(data) + begin, 0, extent, values);
    }
  }
  store_gradients(static_cast<Real*>(data) + begin, 0, extent, values);
}

// A few weights in the type of the arithmetic.
template <class Real>
struct StepVector {
  static constexpr int kCount = kStepWidth<Real>;
  int64_t begin;
  Extent extent;
  Real weights[kCount], gradients[kCount];

  // The elements from `first` on that lie before `end`.
  __device__ __forceinline__ StepVector(const StepProblem& problem, int64_t first, int64_t end)
      : begin(first), extent(extent_of<kCount>(first, end)), weights{}, gradients{} {
    extent.first = 0;
    load_any(problem.weight, problem.element, begin, 1, extent, weights);
    load_any(problem.gradient, problem.gradient_element, begin, 1, extent, gradients);
    if (problem.rounding == Rounding::kKahan) {
      Real residual[kCount] = {};
      load_any(problem.residual, problem.element, begin, 1, extent, residual);
#pragma unroll
      for (int i = 0; i < kCount; ++i) weights[i] += residual[i];
    }
  }

  __device__ __forceinline__ void load_state(const void* data, Real (&state)[kCount]) const {
    load_any(data, kElement, begin, 1, extent, state);
  }
  __device__ __forceinline__ void store_state(const Real (&state)[kCount], void* data) const {
    store_any(state, data, kElement, begin, extent);
  }

  __device__ __forceinline__ void write(const StepProblem& problem, const RandomBits& random) {
    if constexpr (sizeof(Real) == sizeof(float)) {
      if (problem.rounding == Rounding::kStochastic) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const auto number = static_cast<uint64_t>(problem.first_element + begin + i);
          const uint32_t bits =
              random.of(static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32));
          weights[i] = problem.element == Element::kHalf ? rounded_to_fp16(weights[i], bits)
                                                         : rounded_to_bf16(weights[i], bits);
        }
      }
      if (problem.rounding == Rounding::kKahan) {
        Real residual[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const Real rounded = problem.element == Element::kHalf
                                   ? to_real(__float2half_rn(weights[i]))
                                   : to_real(__float2bfloat16_rn(weights[i]));
          residual[i] = weights[i] - rounded;
        }
        store_any(residual, problem.residual, problem.element, begin, extent);
      }
    }
    store_any(weights, problem.weight, problem.element, begin, extent);
  }

 private:
  static constexpr Element kElement = sizeof(Real) == 8 ? Element::kDouble : Element::kFloat;
};

// Rules that take each element by itself; adagrad of rows of a single element.
template <class Real>
__global__ void __launch_bounds__(kStepThreads)
    step_elements(const StepProblem problem, const StepConstants<Real> constants,
                  const RandomBits random) {
  constexpr int kCount = StepVector<Real>::kCount;
  const int64_t end = problem.rows * problem.columns;
  const int64_t stride = int64_t(gridDim.x) * kStepThreads * kCount;
  const int64_t start = (int64_t(blockIdx.x) * kStepThreads + threadIdx.x) * kCount;
  for (int64_t first = start; first < end; first += stride) {
    StepVector<Real> vector(problem, first, end);
    Real moment[kCount] = {}, squares[kCount] = {};
    if (problem.first != nullptr) vector.load_state(problem.first, moment);
    if (problem.second != nullptr) vector.load_state(problem.second, squares);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Real& weight = vector.weights[i];
      const Real gradient = vector.gradients[i];
      if (problem.rule == Rule::kSgd) {
        weight =
            sgd_step(constants, weight, gradient, problem.first == nullptr ? nullptr : moment + i);
      } else if (problem.rule == Rule::kAdamW) {
        weight = adamw_step(constants, weight, gradient, moment + i, squares + i);
      } else {
        squares[i] += adagrad_square(constants, weight, gradient);
        const Real rate = adagrad_rate(constants, squares[i]);
        weight = adagrad_step(constants, weight, gradient, rate);
      }
    }
    if (problem.first != nullptr) vector.store_state(moment, problem.first);
    if (problem.second != nullptr) vector.store_state(squares, problem.second);
    vector.write(problem, random);
  }
}

// Row-wise adagrad: a warp per row. Left to itself, nvcc takes 40 registers and spills two.
template <class Real>
__global__ void __launch_bounds__(kStepThreads, 4)
    step_rows(const StepProblem problem, const StepConstants<Real> constants,
              const Real inverse_columns, const RandomBits random) {
  constexpr int kCount = StepVector<Real>::kCount;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t warp = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  for (int64_t row = warp; row < problem.rows; row += int64_t(gridDim.x) * kRowsPerBlock) {
    const int64_t begin = row * problem.columns, end = begin + problem.columns;
    Real sum = 0;
    for (int64_t first = begin + lane * kCount; first < end; first += 32 * kCount) {
      const StepVector<Real> vector(problem, first, end);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sum += adagrad_square(constants, vector.weights[i], vector.gradients[i]);
      }
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    }
    Real* const state = static_cast<Real*>(problem.second) + row;
    const Real squares = *state + sum * inverse_columns;
    __syncwarp();  // all have read it
    if (lane == 0) *state = squares;
    const Real rate = adagrad_rate(constants, squares);
    for (int64_t first = begin + lane * kCount; first < end; first += 32 * kCount) {
      StepVector<Real> vector(problem, first, end);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        vector.weights[i] = adagrad_step(constants, vector.weights[i], vector.gradients[i], rate);
      }
      vector.write(problem, random);
    }
  }
}

template <class Real>
cudaError_t launch_step(const StepProblem& problem, cudaStream_t stream) {
  const StepConstants<Real> constants(problem);
  const RandomBits random(problem.seed, static_cast<uint64_t>(problem.step));
  const auto blocks = [](int64_t units, int64_t per_block) {
    return dim3(static_cast<unsigned>(std::min((units + per_block - 1) / per_block, kStepBlocks)));
  };
  if (problem.rule == Rule::kAdagrad && problem.columns > 1) {
    return MLLOSS_LAUNCH((step_rows<Real>), blocks(problem.rows, kRowsPerBlock), dim3(kStepThreads),
                         stream, problem, constants, Real(1) / Real(problem.columns), random);
  }
  return MLLOSS_LAUNCH((step_elements<Real>),
                       blocks(problem.rows * problem.columns, kStepThreads * kStepWidth<Real>),
                       dim3(kStepThreads), stream, problem, constants, random);
}

}  // namespace

cudaError_t optimizer_step(const StepProblem& problem, cudaStream_t stream) {
  if (problem.rows == 0 || problem.columns == 0) return cudaSuccess;
  return problem.element == Element::kDouble ? launch_step<double>(problem, stream)
                                             : launch_step<float>(problem, stream);
}

}  // namespace mlloss::cuda
