// From tensors to kernels: the operators of every kind of loss once, for all losses and backends.
// `Backend` names the tensor type and the kernels of a loss; the product has cpu/ops.cpp and
// cuda/ops.cpp, the tests add the emulated GPU.
//
// Python has checked the arguments (functional.py, targets.py); the order of arguments is that of
// the schemas in ops.cpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>

#include "losses.h"
#include "problem.h"

namespace mlloss {

// What all operators do with their arguments.
template <class Backend>
struct Arguments {
  using Tensor = typename Backend::Tensor;
  using Optional = std::optional<Tensor>;

  // target, target_offsets, target_values, target_format, mask, mask_offsets, mask_format,
  // ignore_index: how every operator is given its labels.
  struct LabelArguments {
    const Tensor& target;
    const Optional& target_offsets;
    const Optional& target_values;
    int64_t target_format;
    const Optional& mask;
    const Optional& mask_offsets;
    int64_t mask_format;
    std::optional<double> ignore_index;
  };

  // [N, C], or a broadcast view of it.
  static Strided matrix(const Optional& tensor) {
    if (!tensor.has_value()) return {};
    return {tensor->data_ptr(), Backend::element(*tensor), tensor->stride(0), tensor->stride(1)};
  }

  // [N], or a broadcast view of it.
  static Strided vector(const Optional& tensor) {
    if (!tensor.has_value()) return {};
    return {tensor->data_ptr(), Backend::element(*tensor), tensor->stride(0), 0};
  }

  // 0-d, [N] or [N, C].
  static Strided upstream(const Tensor& grad_output) {
    if (grad_output.dim() == 0)
      return {grad_output.data_ptr(), Backend::element(grad_output), 0, 0};
    return grad_output.dim() == 1 ? vector(grad_output) : matrix(grad_output);
  }

  // The operators may be called with anything; shapes are checked so far that no access is out of
  // bounds. Whoever calls the functions in Python gets better messages from there.
  static Labels labels(const Tensor& input, const Tensor& data, const Optional& offsets,
                       const Optional& values, int64_t format) {
    Labels result;
    result.format = static_cast<Format>(format);
    result.data = data.data_ptr();
    result.element = Backend::element(data);
    if (result.format == Format::kDense) {
      Backend::check(
          data.dim() == 2 && data.size(0) == input.size(0) && data.size(1) == input.size(1),
          "dense labels must have the shape of input");
      result.row_stride = data.stride(0);
      result.column_stride = data.stride(1);
      return result;
    }
    if (result.format == Format::kPacked) {
      Backend::check(data.dim() == 2 && data.size(0) == input.size(0) &&
                         data.size(1) == (input.size(1) + kWordBits - 1) / kWordBits &&
                         (data.size(1) <= 1 || data.stride(1) == 1) &&
                         result.element == Element::kInt32,
                     "packed labels must be int32 [N, C / 32 rounded up] with unit stride");
      if (result.data == nullptr) result.data = &kNothing;
      result.row_stride = data.stride(0);
      return result;
    }
    Backend::check(result.format == Format::kSparse || result.format == Format::kObserved,
                   "unknown format of labels");
    Backend::check(data.dim() == 1 && offsets.has_value() &&
                       offsets->numel() == input.size(0) + 1 &&
                       Backend::element(*offsets) == result.element,
                   "sparse labels must have N + 1 offsets of the dtype of their indices");
    Backend::check(!values.has_value() || values->numel() == data.numel(),
                   "sparse labels must have as many values as indices");
    if (result.data == nullptr) result.data = &kNothing;
    result.offsets = offsets->data_ptr();
    result.entries = data.numel();
    if (values.has_value()) {
      result.values = values->data_ptr() == nullptr ? &kNothing : values->data_ptr();
      result.values_element = Backend::element(*values);
    }
    return result;
  }

  // A tensor without elements may have no memory, but nullptr would mean that there is no mask.
  static constexpr int64_t kNothing = 0;

  // `value` as the element type of a target holds it: compared with what is loaded from there.
  static double rounded(double value, Element element) {
    if (element == Element::kFloat) return static_cast<float>(value);
    const int digits = element == Element::kHalf ? 11 : element == Element::kBFloat16 ? 8 : 0;
    if (digits == 0 || !std::isfinite(value)) return value;
    int exponent;
    const double fraction = std::frexp(value, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(fraction, digits)), exponent - digits);
  }

  static void fill(Problem& problem, const Tensor& input, const LabelArguments& arguments,
                   const Optional& normalizer, int64_t reduction) {
    Backend::check(input.dim() == 2 && (input.size(1) <= 1 || input.stride(1) == 1),
                   "input must be [N, C] with unit stride within rows");
    problem.rows = input.size(0);
    problem.columns = input.size(1);
    problem.logits = input.data_ptr();
    problem.element = Backend::element(input);
    problem.row_stride = input.stride(0);
    problem.target = labels(input, arguments.target, arguments.target_offsets,
                            arguments.target_values, arguments.target_format);
    if (arguments.mask.has_value()) {
      problem.mask =
          labels(input, *arguments.mask, arguments.mask_offsets, {}, arguments.mask_format);
      Backend::check(problem.mask.format != Format::kObserved, "a mask is dense, sparse or packed");
    }
    problem.has_ignored = arguments.ignore_index.has_value();
    problem.ignored = rounded(arguments.ignore_index.value_or(0), problem.target.element);
    problem.reduction = static_cast<Reduction>(reduction);
    problem.batch = problem.rows;
    if (normalizer.has_value()) {
      problem.normalizer = static_cast<const double*>(normalizer->data_ptr());
    }
  }

  // One pass: the gradient goes to where the logits are.
  static void write_over_input(const Problem& problem, const Tensor& input,
                               const Optional& grad_scale, ForwardOutput& output) {
    Backend::check(problem.reduction != Reduction::kNone,
                   "an unreduced loss has no gradient of its own to be written over the logits");
    Backend::check(problem.rows <= 1 || problem.row_stride >= problem.columns,
                   "the rows of input must not overlap, since they are written to");
    // Empty logits may have no memory, but nullptr would mean that no gradient is wanted.
    static int64_t nothing;
    output.gradient = input.data_ptr() == nullptr ? &nothing : input.data_ptr();
    if (grad_scale.has_value()) {
      output.gradient_scale = static_cast<const double*>(grad_scale->data_ptr());
    }
  }
};

// The operator that multiplies a gradient by what comes from above.
template <class Backend>
struct RescaleOperator {
  using Tensor = typename Backend::Tensor;

  static void rescale(const Tensor& gradient, const Tensor& grad_output,
                      const std::optional<Tensor>& grad_scale) {
    Backend::check(gradient.dim() == 2 && (gradient.size(1) <= 1 || gradient.stride(1) == 1) &&
                       (gradient.size(0) <= 1 || gradient.stride(0) >= gradient.size(1)),
                   "gradient must be [N, C] with unit stride within rows that do not overlap");
    if (gradient.numel() == 0) return;
    RescaleProblem problem;
    problem.rows = gradient.size(0);
    problem.columns = gradient.size(1);
    problem.gradient = gradient.data_ptr();
    problem.element = Backend::element(gradient);
    problem.row_stride = gradient.stride(0);
    problem.grad_output = grad_output.data_ptr();
    problem.grad_output_element = Backend::element(grad_output);
    if (grad_scale.has_value()) {
      problem.gradient_scale = static_cast<const double*>(grad_scale->data_ptr());
    }
    Backend::rescale(gradient, problem);
  }
};

// The operator that lets an optimizer take a step.
template <class Backend>
struct StepOperator {
  using Tensor = typename Backend::Tensor;
  using Optional = std::optional<Tensor>;

  static void step(const Tensor& weight, const Tensor& gradient, const Optional& first,
                   const Optional& second, const Optional& residual, int64_t rule, int64_t rounding,
                   double lr, double weight_decay, double momentum, double beta2, double eps,
                   double gradient_factor, int64_t step, int64_t seed, int64_t first_element) {
    StepProblem problem;
    Backend::check(weight.dim() == 2, "weight must be [rows, columns]");
    problem.rows = weight.size(0);
    problem.columns = weight.size(1);
    problem.element = Backend::element(weight);
    problem.gradient_element = Backend::element(gradient);
    problem.rule = static_cast<Rule>(rule);
    problem.rounding = static_cast<Rounding>(rounding);
    const Element real = problem.element == Element::kDouble ? Element::kDouble : Element::kFloat;
    const auto data_of = [&](const Tensor& tensor, int64_t numel, Element element) {
      Backend::check(tensor.numel() == numel && Backend::element(tensor) == element,
                     "weight, gradient and states must have matching sizes and dtypes");
      Backend::check(is_contiguous(tensor), "weight, gradient and states must be contiguous");
      return tensor.data_ptr();
    };
    const int64_t numel = weight.numel();
    const bool is_low = problem.element == Element::kHalf || problem.element == Element::kBFloat16;
    Backend::check(is_low || problem.element == real, "weight must be floating point");
    Backend::check(problem.rounding == Rounding::kNearest || is_low,
                   "only low precision has a choice of rounding");
    problem.weight = data_of(weight, numel, problem.element);
    problem.gradient = data_of(gradient, numel, problem.gradient_element);
    if (first.has_value()) problem.first = data_of(*first, numel, real);
    if (second.has_value()) {
      const int64_t count = problem.rule == Rule::kAdagrad ? problem.rows : numel;
      problem.second = data_of(*second, count, real);
    }
    if (problem.rounding == Rounding::kKahan) {
      Backend::check(residual.has_value(), "Kahan's rounding needs residuals");
      problem.residual = data_of(*residual, numel, problem.element);
    }
    Backend::check(problem.rule == Rule::kSgd || second.has_value(), "a state is missing");
    Backend::check(problem.rule != Rule::kAdamW || first.has_value(), "a state is missing");
    problem.lr = lr;
    problem.weight_decay = weight_decay;
    problem.momentum = momentum;
    problem.beta2 = beta2;
    problem.eps = eps;
    problem.gradient_factor = gradient_factor;
    problem.step = step;
    problem.seed = static_cast<uint64_t>(seed);
    problem.first_element = first_element;
    Backend::optimizer_step(weight, problem);
  }

 private:
  static bool is_contiguous(const Tensor& tensor) {
    int64_t stride = 1;
    for (int64_t dimension = tensor.dim() - 1; dimension >= 0; --dimension) {
      if (tensor.size(dimension) > 1 && tensor.stride(dimension) != stride) return false;
      stride *= tensor.size(dimension);
    }
    return true;
  }
};

// T, once for every element of a pack of numbers.
template <std::size_t, class T>
using Each = T;

// The operators of a loss that is a sum over elements, with `kTensors` tensors and `kNumbers`
// numbers of its own (losses.h).
template <class Backend, class Tensors, class Numbers>
struct PointwiseOperators;

template <class Backend, std::size_t... kTensors, std::size_t... kNumbers>
struct PointwiseOperators<Backend, std::index_sequence<kTensors...>,
                          std::index_sequence<kNumbers...>> : Arguments<Backend> {
  using typename Arguments<Backend>::Tensor;
  using typename Arguments<Backend>::Optional;

  static void forward(const Tensor& input, const Tensor& target, const Optional& target_offsets,
                      const Optional& target_values, int64_t target_format, const Optional& mask,
                      const Optional& mask_offsets, int64_t mask_format,
                      std::optional<double> ignore_index, const Optional& weight,
                      Each<kTensors, const Optional&>... tensors, Each<kNumbers, double>... numbers,
                      double label_smoothing, const Optional& normalizer, int64_t reduction,
                      const Tensor& loss, const Tensor& scale) {
    PointwiseProblem problem{{},
                             PointwiseOperators::matrix(weight),
                             {PointwiseOperators::matrix(tensors)...},
                             {numbers...},
                             label_smoothing};
    PointwiseOperators::fill(problem, input,
                             {target, target_offsets, target_values, target_format, mask,
                              mask_offsets, mask_format, ignore_index},
                             normalizer, reduction);
    Backend::forward(input, problem,
                     {loss.data_ptr(), nullptr, static_cast<double*>(scale.data_ptr())});
  }

  static void inplace(const Tensor& input, const Tensor& target, const Optional& target_offsets,
                      const Optional& target_values, int64_t target_format, const Optional& mask,
                      const Optional& mask_offsets, int64_t mask_format,
                      std::optional<double> ignore_index, const Optional& weight,
                      Each<kTensors, const Optional&>... tensors, Each<kNumbers, double>... numbers,
                      double label_smoothing, const Optional& normalizer, int64_t reduction,
                      const Optional& grad_scale, const Tensor& loss, const Tensor& scale) {
    PointwiseProblem problem{{},
                             PointwiseOperators::matrix(weight),
                             {PointwiseOperators::matrix(tensors)...},
                             {numbers...},
                             label_smoothing};
    PointwiseOperators::fill(problem, input,
                             {target, target_offsets, target_values, target_format, mask,
                              mask_offsets, mask_format, ignore_index},
                             normalizer, reduction);
    ForwardOutput output{loss.data_ptr(), nullptr, static_cast<double*>(scale.data_ptr())};
    PointwiseOperators::write_over_input(problem, input, grad_scale, output);
    Backend::forward(input, problem, output);
  }

  static void backward(const Tensor& grad_output, const Tensor& scale, const Tensor& input,
                       const Tensor& target, const Optional& target_offsets,
                       const Optional& target_values, int64_t target_format, const Optional& mask,
                       const Optional& mask_offsets, int64_t mask_format,
                       std::optional<double> ignore_index, const Optional& weight,
                       Each<kTensors, const Optional&>... tensors,
                       Each<kNumbers, double>... numbers, double label_smoothing,
                       const Optional& normalizer, int64_t reduction, const Tensor& grad_input) {
    PointwiseProblem problem{{},
                             PointwiseOperators::matrix(weight),
                             {PointwiseOperators::matrix(tensors)...},
                             {numbers...},
                             label_smoothing};
    PointwiseOperators::fill(problem, input,
                             {target, target_offsets, target_values, target_format, mask,
                              mask_offsets, mask_format, ignore_index},
                             normalizer, reduction);
    Backend::backward(input, problem,
                      {PointwiseOperators::upstream(grad_output),
                       static_cast<const double*>(scale.data_ptr()), nullptr},
                      {grad_input.data_ptr(), nullptr});
  }
};

// The operators of a loss that is a function of two sums over a row, with a threshold or without.
template <class Backend, class Thresholds>
struct RowwiseOperators;

template <class Backend, std::size_t... kThresholds>
struct RowwiseOperators<Backend, std::index_sequence<kThresholds...>> : Arguments<Backend> {
  using typename Arguments<Backend>::Tensor;
  using typename Arguments<Backend>::Optional;

  static void forward(const Tensor& input, const Tensor& target, const Optional& target_offsets,
                      const Optional& target_values, int64_t target_format, const Optional& mask,
                      const Optional& mask_offsets, int64_t mask_format,
                      std::optional<double> ignore_index,
                      Each<kThresholds, const Tensor&>... threshold, const Optional& weight,
                      const Optional& normalizer, int64_t reduction, const Tensor& loss,
                      const Tensor& statistics, const Tensor& scale) {
    RowwiseProblem problem{
        {}, {RowwiseOperators::vector(threshold)...}, RowwiseOperators::vector(weight)};
    RowwiseOperators::fill(problem, input,
                           {target, target_offsets, target_values, target_format, mask,
                            mask_offsets, mask_format, ignore_index},
                           normalizer, reduction);
    Backend::forward(
        input, problem,
        {loss.data_ptr(), statistics.data_ptr(), static_cast<double*>(scale.data_ptr())});
  }

  static void inplace(const Tensor& input, const Tensor& target, const Optional& target_offsets,
                      const Optional& target_values, int64_t target_format, const Optional& mask,
                      const Optional& mask_offsets, int64_t mask_format,
                      std::optional<double> ignore_index,
                      Each<kThresholds, const Tensor&>... threshold, const Optional& weight,
                      const Optional& normalizer, int64_t reduction, const Optional& grad_scale,
                      const Tensor& loss, const Tensor& statistics, const Tensor& scale,
                      Each<kThresholds, const Tensor&>... grad_threshold) {
    RowwiseProblem problem{
        {}, {RowwiseOperators::vector(threshold)...}, RowwiseOperators::vector(weight)};
    RowwiseOperators::fill(problem, input,
                           {target, target_offsets, target_values, target_format, mask,
                            mask_offsets, mask_format, ignore_index},
                           normalizer, reduction);
    ForwardOutput output{loss.data_ptr(), statistics.data_ptr(),
                         static_cast<double*>(scale.data_ptr())};
    RowwiseOperators::write_over_input(problem, input, grad_scale, output);
    ((output.gradient_threshold = grad_threshold.data_ptr()), ...);
    Backend::forward(input, problem, output);
  }

  static void backward(const Tensor& grad_output, const Tensor& scale, const Tensor& statistics,
                       const Tensor& input, const Tensor& target, const Optional& target_offsets,
                       const Optional& target_values, int64_t target_format, const Optional& mask,
                       const Optional& mask_offsets, int64_t mask_format,
                       std::optional<double> ignore_index,
                       Each<kThresholds, const Tensor&>... threshold, const Optional& weight,
                       const Optional& normalizer, int64_t reduction, const Tensor& grad_input,
                       Each<kThresholds, const Tensor&>... grad_threshold) {
    RowwiseProblem problem{
        {}, {RowwiseOperators::vector(threshold)...}, RowwiseOperators::vector(weight)};
    RowwiseOperators::fill(problem, input,
                           {target, target_offsets, target_values, target_format, mask,
                            mask_offsets, mask_format, ignore_index},
                           normalizer, reduction);
    Backend::backward(input, problem,
                      {RowwiseOperators::upstream(grad_output),
                       static_cast<const double*>(scale.data_ptr()), statistics.data_ptr()},
                      {grad_input.data_ptr(), grad_threshold.data_ptr()...});
  }
};

// <name>_operators, from <name>_kernels, a backend: Tensor, element(), check(), and forward() and
// backward() of the loss. RescaleOperator takes one with rescale() in their place.
#define MLLOSS_POINTWISE_OPERATORS(name, tensors, numbers)                                       \
  using name##_operators = PointwiseOperators<name##_kernels, std::make_index_sequence<tensors>, \
                                              std::make_index_sequence<numbers>>;
#define MLLOSS_ROWWISE_OPERATORS(name, thresholds) \
  using name##_operators = RowwiseOperators<name##_kernels, std::make_index_sequence<thresholds>>;

}  // namespace mlloss
