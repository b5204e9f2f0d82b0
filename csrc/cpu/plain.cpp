// The losses of dense or packed targets and nothing else: no mask, no weights, no tensors of the
// loss's own, threshold 0. Nothing is computed here; these operators exist because passing 16 to 22
// arguments through torch's dispatcher costs 2.5 us, and passing the few that matter costs 1.1 us
// (AMD EPYC, 8 elements; the whole of F.binary_cross_entropy_with_logits is 5 us).
//
// Without mask and weights the denominator follows from the shape, so there is no `scale` to keep.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/kernels.h"
#include "math/reduction.h"
#include "operators.h"
#include "torch_tensor.h"

namespace mlloss {
namespace {

using Tensor = TorchTensors::Tensor;
using Optional = std::optional<Tensor>;

void fill(Problem& problem, const Tensor& input, const Tensor& target, int64_t target_format,
          int64_t reduction) {
  TorchTensors::check(reduction >= 0 && reduction < static_cast<int64_t>(Reduction::kNormalizer),
                      "unknown reduction");
  const Optional none;
  Arguments<TorchTensors>::fill(problem, input,
                                {target, none, none, target_format, none, none, 0, std::nullopt},
                                none, reduction);
}

// `counted`: the number of losses.
double scale_by_shape(const Problem& problem, int64_t counted) {
  return scale_of(denominator_of(problem.reduction, static_cast<double>(counted), problem.batch,
                                 problem.normalizer));
}

template <auto kForward, auto kBackward, class Numbers>
struct PlainPointwise;

template <auto kForward, auto kBackward, std::size_t... kNumbers>
struct PlainPointwise<kForward, kBackward, std::index_sequence<kNumbers...>> {
  static PointwiseProblem make(const Tensor& input, const Tensor& target, int64_t target_format,
                               int64_t reduction, Each<kNumbers, double>... numbers) {
    PointwiseProblem problem;
    ((problem.numbers[kNumbers] = numbers), ...);
    fill(problem, input, target, target_format, reduction);
    return problem;
  }

  static void forward(const Tensor& input, const Tensor& target, int64_t target_format,
                      Each<kNumbers, double>... numbers, int64_t reduction, const Tensor& loss) {
    double scale;
    kForward(make(input, target, target_format, reduction, numbers...),
             {loss.data_ptr(), nullptr, &scale});
  }

  static void backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                       int64_t target_format, Each<kNumbers, double>... numbers, int64_t reduction,
                       const Tensor& grad_input) {
    const PointwiseProblem problem = make(input, target, target_format, reduction, numbers...);
    const double scale = scale_by_shape(problem, problem.rows * problem.columns);
    kBackward(problem, {Arguments<TorchTensors>::upstream(grad_output), &scale, nullptr},
              {grad_input.data_ptr(), nullptr});
  }
};

template <auto kForward, auto kBackward, int kThresholds>
struct PlainRowwise {
  static RowwiseProblem make(const Tensor& input, const Tensor& target, int64_t target_format,
                             int64_t reduction) {
    static const double zero = 0;
    RowwiseProblem problem;
    if (kThresholds == 1) problem.threshold = {&zero, Element::kDouble, 0, 0};
    fill(problem, input, target, target_format, reduction);
    return problem;
  }

  static void forward(const Tensor& input, const Tensor& target, int64_t target_format,
                      int64_t reduction, const Tensor& loss, const Optional& statistics) {
    const RowwiseProblem problem = make(input, target, target_format, reduction);
    std::vector<double> unwanted(statistics.has_value() ? 0 : 4 * problem.rows);
    double scale;
    kForward(problem, {loss.data_ptr(),
                       statistics.has_value() ? statistics->data_ptr() : unwanted.data(), &scale});
  }

  static void backward(const Tensor& grad_output, const Tensor& statistics, const Tensor& input,
                       const Tensor& target, int64_t target_format, int64_t reduction,
                       const Tensor& grad_input) {
    const RowwiseProblem problem = make(input, target, target_format, reduction);
    const double scale = scale_by_shape(problem, problem.rows);
    std::vector<double> unwanted(kThresholds * problem.rows);
    kBackward(problem,
              {Arguments<TorchTensors>::upstream(grad_output), &scale, statistics.data_ptr()},
              {grad_input.data_ptr(), unwanted.data()});
  }
};

#define MLLOSS_PLAIN_POINTWISE(name, tensors, numbers) \
  using name##_plain =                                 \
      PlainPointwise<cpu::name::forward, cpu::name::backward, std::make_index_sequence<numbers>>;
#define MLLOSS_PLAIN_ROWWISE(name, thresholds) \
  using name##_plain = PlainRowwise<cpu::name::forward, cpu::name::backward, thresholds>;
MLLOSS_POINTWISE_LOSSES(MLLOSS_PLAIN_POINTWISE)
MLLOSS_ROWWISE_LOSSES(MLLOSS_PLAIN_ROWWISE)

}  // namespace
}  // namespace mlloss

STABLE_TORCH_LIBRARY_IMPL(mlloss_cuda, CPU, m) {
#define MLLOSS_REGISTER(name, ...)                                       \
  m.impl(#name "_plain_out", TORCH_BOX(&mlloss::name##_plain::forward)); \
  m.impl(#name "_plain_backward_out", TORCH_BOX(&mlloss::name##_plain::backward));
  MLLOSS_POINTWISE_LOSSES(MLLOSS_REGISTER)
  MLLOSS_ROWWISE_LOSSES(MLLOSS_REGISTER)
#undef MLLOSS_REGISTER
}
