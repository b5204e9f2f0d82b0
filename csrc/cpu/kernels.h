// The CPU kernels, one source file per loss: cpu::<loss>::forward and cpu::<loss>::backward; and
// cpu::rescale, cpu::optimizer_step.
#pragma once
#include "losses.h"
#include "problem.h"

namespace mlloss::cpu {

#define MLLOSS_DECLARE(name, Problem)                                                              \
  namespace name {                                                                                 \
  void forward(const Problem& problem, const ForwardOutput& output);                               \
  void backward(const Problem& problem, const BackwardInput& input, const BackwardOutput& output); \
  }
#define MLLOSS_DECLARE_POINTWISE(name, ...) MLLOSS_DECLARE(name, PointwiseProblem)
#define MLLOSS_DECLARE_ROWWISE(name, ...) MLLOSS_DECLARE(name, RowwiseProblem)

MLLOSS_POINTWISE_LOSSES(MLLOSS_DECLARE_POINTWISE)
MLLOSS_ROWWISE_LOSSES(MLLOSS_DECLARE_ROWWISE)
MLLOSS_ROW_SUMS(MLLOSS_DECLARE_ROWWISE)  // forward alone

#undef MLLOSS_DECLARE_ROWWISE
#undef MLLOSS_DECLARE_POINTWISE
#undef MLLOSS_DECLARE

void rescale(RescaleProblem problem);
void optimizer_step(const StepProblem& problem);

}  // namespace mlloss::cpu
