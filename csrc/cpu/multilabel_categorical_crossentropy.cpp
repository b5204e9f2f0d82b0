// Multi-label categorical cross-entropy (ZLPR) on the CPU: the row-wise loops, compiled for each
// instruction set.
#include "math/multilabel_categorical_crossentropy.h"

#include "cpu/kernels.h"
#include "cpu/rowwise.h"

namespace mlloss::cpu {
namespace rows {

MLLOSS_CLONES RowSums<double> sums(const Tile<float>& tile) { return sums_of_tile(tile); }
MLLOSS_CLONES RowSums<double> sums(const Tile<double>& tile) { return sums_of_tile(tile); }

MLLOSS_CLONES void gradients(const Tile<float>& tile, const RowStatistics<float>& statistics,
                             float scale, float* out) {
  gradients_of_tile(tile, statistics, scale, out);
}

MLLOSS_CLONES void gradients(const Tile<double>& tile, const RowStatistics<double>& statistics,
                             double scale, double* out) {
  gradients_of_tile(tile, statistics, scale, out);
}

}  // namespace rows

namespace {

template <class Real>
void run_forward(const RowwiseProblem& problem, const ForwardOutput& output) {
  rowwise_forward<MultilabelCategoricalCrossentropy, Real>(
      problem, output, [](const Tile<Real>& tile) { return rows::sums(tile); });
}

template <class Real>
void run_backward(const RowwiseProblem& problem, const BackwardInput& input,
                  const BackwardOutput& output) {
  rowwise_backward<MultilabelCategoricalCrossentropy, Real>(
      problem, input, output,
      [](const Tile<Real>& tile, const RowStatistics<Real>& statistics, Real scale, Real* out) {
        rows::gradients(tile, statistics, scale, out);
      });
}

}  // namespace

void multilabel_categorical_crossentropy_forward(const RowwiseProblem& problem,
                                                 const ForwardOutput& output) {
  const bool is_double = problem.element == Element::kDouble;
  (is_double ? run_forward<double> : run_forward<float>)(problem, output);
}

void multilabel_categorical_crossentropy_backward(const RowwiseProblem& problem,
                                                  const BackwardInput& input,
                                                  const BackwardOutput& output) {
  const bool is_double = problem.element == Element::kDouble;
  (is_double ? run_backward<double> : run_backward<float>)(problem, input, output);
}

}  // namespace mlloss::cpu
