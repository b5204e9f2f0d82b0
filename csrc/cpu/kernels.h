// The CPU kernels, one source file per loss.
#pragma once
#include "problem.h"

namespace mlloss::cpu {

void sigmoid_cross_entropy_forward(const PointwiseProblem& problem, double label_smoothing,
                                   const ForwardOutput& output);
void sigmoid_cross_entropy_backward(const PointwiseProblem& problem, double label_smoothing,
                                    const BackwardInput& input, const BackwardOutput& output);

void multilabel_categorical_crossentropy_forward(const RowwiseProblem& problem,
                                                 const ForwardOutput& output);
void multilabel_categorical_crossentropy_backward(const RowwiseProblem& problem,
                                                  const BackwardInput& input,
                                                  const BackwardOutput& output);

}  // namespace mlloss::cpu
