// The two sums of rows alone, on the CPU.
#include "math/row_sums.h"

#include "cpu/kernels.h"
#include "cpu/rowwise.h"

MLLOSS_ROWWISE_SUMS(row_sums, RowSumsAlone)

namespace mlloss::cpu::row_sums {

void forward(const RowwiseProblem& problem, const ForwardOutput& output) {
  const auto loop = [](const auto& tile) { return sums_loop(tile); };
  if (problem.element == Element::kDouble) {
    rowwise_losses<RowSumsAlone, double>(problem, output, loop, finish_loop);
  } else {
    rowwise_losses<RowSumsAlone, float>(problem, output, loop, finish_loop);
  }
}

}  // namespace mlloss::cpu::row_sums
