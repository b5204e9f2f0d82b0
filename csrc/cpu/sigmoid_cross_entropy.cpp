// Sigmoid cross-entropy on the CPU: the pointwise loops, compiled for each instruction set.
#include "math/sigmoid_cross_entropy.h"

#include "cpu/kernels.h"
#include "cpu/pointwise.h"

namespace mlloss::cpu {
namespace sigmoid_cross_entropy {

MLLOSS_CLONES double forward(const SigmoidCrossEntropy<float>& loss,
                             const PointwiseTile<float>& tile, float* losses) {
  return forward_tile(loss, tile, losses);
}

MLLOSS_CLONES double forward(const SigmoidCrossEntropy<double>& loss,
                             const PointwiseTile<double>& tile, double* losses) {
  return forward_tile(loss, tile, losses);
}

MLLOSS_CLONES void backward(const SigmoidCrossEntropy<float>& loss,
                            const PointwiseTile<float>& tile, float scale, float* gradients) {
  backward_tile(loss, tile, scale, gradients);
}

MLLOSS_CLONES void backward(const SigmoidCrossEntropy<double>& loss,
                            const PointwiseTile<double>& tile, double scale, double* gradients) {
  backward_tile(loss, tile, scale, gradients);
}

}  // namespace sigmoid_cross_entropy

namespace {

template <class Real>
void run_forward(const PointwiseProblem& problem, double label_smoothing,
                 const ForwardOutput& output) {
  pointwise_forward(problem, SigmoidCrossEntropy<Real>::with_smoothing(label_smoothing), output,
                    [](const auto& loss, const auto& tile, Real* losses) {
                      return sigmoid_cross_entropy::forward(loss, tile, losses);
                    });
}

template <class Real>
void run_backward(const PointwiseProblem& problem, double label_smoothing,
                  const BackwardInput& input, const BackwardOutput& output) {
  pointwise_backward(problem, SigmoidCrossEntropy<Real>::with_smoothing(label_smoothing), input,
                     output, [](const auto& loss, const auto& tile, Real scale, Real* gradients) {
                       sigmoid_cross_entropy::backward(loss, tile, scale, gradients);
                     });
}

}  // namespace

void sigmoid_cross_entropy_forward(const PointwiseProblem& problem, double label_smoothing,
                                   const ForwardOutput& output) {
  const bool is_double = problem.element == Element::kDouble;
  (is_double ? run_forward<double> : run_forward<float>)(problem, label_smoothing, output);
}

void sigmoid_cross_entropy_backward(const PointwiseProblem& problem, double label_smoothing,
                                    const BackwardInput& input, const BackwardOutput& output) {
  const bool is_double = problem.element == Element::kDouble;
  (is_double ? run_backward<double> : run_backward<float>)(problem, label_smoothing, input, output);
}

}  // namespace mlloss::cpu
