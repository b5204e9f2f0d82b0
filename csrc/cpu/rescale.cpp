// Multiplication of a gradient that was written together with the loss, on the CPU.
#include <algorithm>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/labels.h"
#include "cpu/work.h"
#include "math/rescale.h"

namespace mlloss::cpu {
namespace {

MLLOSS_CLONES void multiply(const float* values, int count, float factor, float* products) {
#pragma omp simd
  for (int i = 0; i < count; ++i) products[i] = rescaled(values[i], factor);
}

MLLOSS_CLONES void multiply(const double* values, int count, double factor, double* products) {
#pragma omp simd
  for (int i = 0; i < count; ++i) products[i] = rescaled(values[i], factor);
}

template <class Real>
void rescale_all(const RescaleProblem& problem, double factor) {
  const Pieces pieces(problem.rows, problem.columns);
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    alignas(64) Real buffer[kTile];
    for (int64_t index = first; index < last; ++index) {
      const Piece piece = pieces[index];
      for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
        for (int64_t begin = piece.column_begin; begin < piece.column_end; begin += kTile) {
          const int count = static_cast<int>(std::min<int64_t>(kTile, piece.column_end - begin));
          const int64_t offset = row * problem.row_stride + begin;
          load(problem.gradient, problem.element, offset, 1, count, buffer);
          multiply(buffer, count, static_cast<Real>(factor), buffer);
          store(buffer, count, problem.gradient, problem.element, offset);
        }
      }
    }
  });
}

}  // namespace

void rescale(RescaleProblem problem) {
  flatten(problem);
  double upstream;
  load(problem.grad_output, problem.grad_output_element, 0, 0, 1, &upstream);
  const double factor = rescaling_factor(upstream, problem.gradient_scale);
  if (factor == 1) return;
  if (problem.element == Element::kDouble) {
    rescale_all<double>(problem, factor);
  } else {
    rescale_all<float>(problem, factor);
  }
}

}  // namespace mlloss::cpu
