// One step of an optimizer on the CPU: a single pass over weights, gradient and state.
#include "math/optimizer_step.h"

#include <algorithm>
#include <cmath>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"
#include "cpu/tiles.h"
#include "cpu/work.h"

namespace mlloss::cpu {
namespace {

// ---- Loops over a tile, for floats and doubles ----

#define MLLOSS_STEP_LOOPS(Real)                                                                    \
  MLLOSS_CLONES void sgd(const StepConstants<Real>& constants, int count, const Real* gradients,   \
                         Real* momenta, Real* weights) {                                           \
    if (momenta == nullptr) {                                                                      \
      _Pragma("omp simd") for (int i = 0; i < count; ++i) {                                        \
        weights[i] = sgd_step<Real>(constants, weights[i], gradients[i], nullptr);                 \
      }                                                                                            \
      return;                                                                                      \
    }                                                                                              \
    _Pragma("omp simd") for (int i = 0; i < count; ++i) {                                          \
      weights[i] = sgd_step(constants, weights[i], gradients[i], momenta + i);                     \
    }                                                                                              \
  }                                                                                                \
  MLLOSS_CLONES void adamw(const StepConstants<Real>& constants, int count, const Real* gradients, \
                           Real* first, Real* second, Real* weights) {                             \
    _Pragma("omp simd") for (int i = 0; i < count; ++i) {                                          \
      weights[i] = adamw_step(constants, weights[i], gradients[i], first + i, second + i);         \
    }                                                                                              \
  }                                                                                                \
  MLLOSS_CLONES Real sum_of_squares(const StepConstants<Real>& constants, int count,               \
                                    const Real* gradients, const Real* weights) {                  \
    return lane_sum<Real>(count, [&](int i) MLLOSS_INLINE_LAMBDA {                                 \
      return adagrad_square(constants, weights[i], gradients[i]);                                  \
    });                                                                                            \
  }                                                                                                \
  MLLOSS_CLONES void adagrad(const StepConstants<Real>& constants, int count,                      \
                             const Real* gradients, Real rate, Real* weights) {                    \
    _Pragma("omp simd") for (int i = 0; i < count; ++i) {                                          \
      weights[i] = adagrad_step(constants, weights[i], gradients[i], rate);                        \
    }                                                                                              \
  }                                                                                                \
  /* Rows of a single element. */                                                                  \
  MLLOSS_CLONES void adagrad_each(const StepConstants<Real>& constants, int count,                 \
                                  const Real* gradients, Real* squares, Real* weights) {           \
    _Pragma("omp simd") for (int i = 0; i < count; ++i) {                                          \
      squares[i] += adagrad_square(constants, weights[i], gradients[i]);                           \
      weights[i] =                                                                                 \
          adagrad_step(constants, weights[i], gradients[i], adagrad_rate(constants, squares[i]));  \
    }                                                                                              \
  }                                                                                                \
  MLLOSS_CLONES void add(int count, const Real* values, Real* sums) {                              \
    _Pragma("omp simd") for (int i = 0; i < count; ++i) sums[i] += values[i];                      \
  }                                                                                                \
  MLLOSS_CLONES void subtract(int count, const Real* values, Real* differences) {                  \
    _Pragma("omp simd") for (int i = 0; i < count; ++i) differences[i] -= values[i];               \
  }
MLLOSS_STEP_LOOPS(float)
MLLOSS_STEP_LOOPS(double)
#undef MLLOSS_STEP_LOOPS

MLLOSS_CLONES void round_to_bf16(const RandomBits& random, uint32_t low, uint32_t high, int count,
                                 float* values) {
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const uint32_t own = low + static_cast<uint32_t>(i);
    values[i] = rounded_to_bf16(values[i], random.of(own, high + (own < low ? 1 : 0)));
  }
}

MLLOSS_CLONES void round_to_fp16(const RandomBits& random, uint32_t low, uint32_t high, int count,
                                 float* values) {
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const uint32_t own = low + static_cast<uint32_t>(i);
    values[i] = rounded_to_fp16(values[i], random.of(own, high + (own < low ? 1 : 0)));
  }
}

// ---- A tile: weights become numbers of the arithmetic and are rounded again ----

template <class Real>
class StepTile {
 public:
  explicit StepTile(const StepProblem& problem)
      : problem_(problem),
        constants_(problem),
        random_(problem.seed, static_cast<uint64_t>(problem.step)) {}

  // The elements [begin, begin + count), count <= kTile.
  void read(int64_t begin, int count) {
    begin_ = begin;
    count_ = count;
    gradients_ = gradient_buffer_;
    if (problem_.gradient_element == kElementOf<Real>) {
      gradients_ = static_cast<const Real*>(problem_.gradient) + begin;
    } else {
      load(problem_.gradient, problem_.gradient_element, begin, 1, count, gradient_buffer_);
    }
    weights_ = weight_buffer_;
    if (problem_.element == kElementOf<Real>) {
      weights_ = static_cast<Real*>(problem_.weight) + begin;
      return;
    }
    load(problem_.weight, problem_.element, begin, 1, count, weight_buffer_);
    if (problem_.rounding == Rounding::kKahan) {
      load(problem_.residual, problem_.element, begin, 1, count, buffer_);
      add(count, buffer_, weight_buffer_);
    }
  }

  Real squares() const { return sum_of_squares(constants_, count_, gradients_, weights_); }

  void step_sgd() { sgd(constants_, count_, gradients_, state(problem_.first), weights_); }

  void step_adamw() {
    adamw(constants_, count_, gradients_, state(problem_.first), state(problem_.second), weights_);
  }

  void step_adagrad(Real squares) {
    adagrad(constants_, count_, gradients_, adagrad_rate(constants_, squares), weights_);
  }

  void step_adagrad_each() {
    adagrad_each(constants_, count_, gradients_, state(problem_.second), weights_);
  }

  void write() {
    if (weights_ != weight_buffer_) return;
    if constexpr (sizeof(Real) == sizeof(float)) {
      if (problem_.rounding == Rounding::kStochastic) {
        const auto number = static_cast<uint64_t>(problem_.first_element + begin_);
        const auto round = problem_.element == Element::kHalf ? round_to_fp16 : round_to_bf16;
        round(random_, static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32), count_,
              weights_);
      }
    }
    store(weights_, count_, problem_.weight, problem_.element, begin_);
    if (problem_.rounding == Rounding::kKahan) {
      load(problem_.weight, problem_.element, begin_, 1, count_, buffer_);
      subtract(count_, buffer_, weights_);
      store(weights_, count_, problem_.residual, problem_.element, begin_);
    }
  }

 private:
  Real* state(void* data) const {
    return data == nullptr ? nullptr : static_cast<Real*>(data) + begin_;
  }

  const StepProblem& problem_;
  const StepConstants<Real> constants_;
  const RandomBits random_;
  int64_t begin_ = 0;
  int count_ = 0;
  const Real* gradients_ = nullptr;
  Real* weights_ = nullptr;
  alignas(64) Real gradient_buffer_[kTile], weight_buffer_[kTile], buffer_[kTile];
};

// Calls body() for the tiles that the elements [begin, end) are read in.
template <class Real, class Body>
void for_step_tiles(StepTile<Real>& tile, int64_t begin, int64_t end, const Body& body) {
  for (int64_t first = begin; first < end; first += kTile) {
    tile.read(first, static_cast<int>(std::min<int64_t>(kTile, end - first)));
    body();
  }
}

// Rules that take each element by itself.
template <class Real>
void step_elements(const StepProblem& problem) {
  const Pieces pieces(1, problem.rows * problem.columns);
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    StepTile<Real> tile(problem);
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      for_step_tiles(tile, piece.column_begin, piece.column_end, [&] {
        if (problem.rule == Rule::kSgd) {
          tile.step_sgd();
        } else if (problem.rule == Rule::kAdamW) {
          tile.step_adamw();
        } else {
          tile.step_adagrad_each();
        }
        tile.write();
      });
    }
  });
}

template <class Real>
void step_rows(const StepProblem& problem) {
  const Pieces pieces = Pieces::of_rows(problem.rows, problem.columns, problem.columns);
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    StepTile<Real> tile(problem);
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
        const int64_t begin = row * problem.columns, end = begin + problem.columns;
        double squares = 0;
        for_step_tiles(tile, begin, end, [&] { squares += tile.squares(); });
        Real& state = static_cast<Real*>(problem.second)[row];
        state += static_cast<Real>(squares / problem.columns);
        for_step_tiles(tile, begin, end, [&] {
          tile.step_adagrad(state);
          tile.write();
        });
      }
    }
  });
}

template <class Real>
void step(const StepProblem& problem) {
  if (problem.rule == Rule::kAdagrad && problem.columns > 1) {
    step_rows<Real>(problem);
  } else {
    step_elements<Real>(problem);
  }
}

}  // namespace

void optimizer_step(const StepProblem& problem) {
  if (problem.rows == 0 || problem.columns == 0) return;
  if (problem.element == Element::kDouble) {
    step<double>(problem);
  } else {
    step<float>(problem);
  }
}

}  // namespace mlloss::cpu
