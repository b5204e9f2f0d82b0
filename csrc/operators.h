// From tensors to kernels: every operator once, for all backends. `Backend` names the tensor type
// and the kernels; the product has cpu/ops.cpp and cuda/ops.cpp, the tests add the emulated GPU.
//
// Python has checked the arguments (functional.py, targets.py); the order of arguments is that of
// the schemas in ops.cpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <optional>

#include "problem.h"

namespace mlloss {

template <class Backend>
struct Operators {
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
    Backend::check(data.dim() == 1 && offsets.has_value() &&
                       offsets->numel() == input.size(0) + 1 &&
                       Backend::element(*offsets) == result.element,
                   "sparse labels must have N + 1 offsets of the dtype of their indices");
    Backend::check(!values.has_value() || values->numel() == data.numel(),
                   "sparse labels must have as many values as indices");
    // A tensor without elements may have no memory, but nullptr would mean that there is no mask.
    static const int64_t nothing = 0;
    if (result.data == nullptr) result.data = &nothing;
    result.offsets = offsets->data_ptr();
    result.entries = data.numel();
    if (values.has_value()) {
      result.values = values->data_ptr() == nullptr ? &nothing : values->data_ptr();
      result.values_element = Backend::element(*values);
    }
    return result;
  }

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
    }
    problem.has_ignored = arguments.ignore_index.has_value();
    problem.ignored = rounded(arguments.ignore_index.value_or(0), problem.target.element);
    problem.reduction = static_cast<Reduction>(reduction);
    problem.batch = problem.rows;
    if (normalizer.has_value()) {
      problem.normalizer = static_cast<const double*>(normalizer->data_ptr());
    }
  }

  // ---- sigmoid_cross_entropy ----

  static void sigmoid_cross_entropy_out(
      const Tensor& input, const Tensor& target, const Optional& target_offsets,
      const Optional& target_values, int64_t target_format, const Optional& mask,
      const Optional& mask_offsets, int64_t mask_format, std::optional<double> ignore_index,
      const Optional& weight, const Optional& pos_weight, double label_smoothing,
      const Optional& normalizer, int64_t reduction, const Tensor& loss, const Tensor& scale) {
    PointwiseProblem problem;
    fill(problem, input,
         {target, target_offsets, target_values, target_format, mask, mask_offsets, mask_format,
          ignore_index},
         normalizer, reduction);
    problem.weight = matrix(weight);
    problem.pos_weight = matrix(pos_weight);
    Backend::sigmoid_cross_entropy_forward(
        input, problem, label_smoothing,
        {loss.data_ptr(), nullptr, static_cast<double*>(scale.data_ptr())});
  }

  static void sigmoid_cross_entropy_backward_out(
      const Tensor& grad_output, const Tensor& scale, const Tensor& input, const Tensor& target,
      const Optional& target_offsets, const Optional& target_values, int64_t target_format,
      const Optional& mask, const Optional& mask_offsets, int64_t mask_format,
      std::optional<double> ignore_index, const Optional& weight, const Optional& pos_weight,
      double label_smoothing, const Optional& normalizer, int64_t reduction,
      const Tensor& grad_input) {
    PointwiseProblem problem;
    fill(problem, input,
         {target, target_offsets, target_values, target_format, mask, mask_offsets, mask_format,
          ignore_index},
         normalizer, reduction);
    problem.weight = matrix(weight);
    problem.pos_weight = matrix(pos_weight);
    Backend::sigmoid_cross_entropy_backward(
        input, problem, label_smoothing,
        {upstream(grad_output), static_cast<const double*>(scale.data_ptr()), nullptr},
        {grad_input.data_ptr(), nullptr});
  }

  // ---- multilabel_categorical_crossentropy ----

  static void multilabel_categorical_crossentropy_out(
      const Tensor& input, const Tensor& target, const Optional& target_offsets,
      const Optional& target_values, int64_t target_format, const Optional& mask,
      const Optional& mask_offsets, int64_t mask_format, std::optional<double> ignore_index,
      const Tensor& threshold, const Optional& weight, const Optional& normalizer,
      int64_t reduction, const Tensor& loss, const Tensor& statistics, const Tensor& scale) {
    RowwiseProblem problem;
    fill(problem, input,
         {target, target_offsets, target_values, target_format, mask, mask_offsets, mask_format,
          ignore_index},
         normalizer, reduction);
    problem.threshold = vector(threshold);
    problem.weight = vector(weight);
    Backend::multilabel_categorical_crossentropy_forward(
        input, problem,
        {loss.data_ptr(), statistics.data_ptr(), static_cast<double*>(scale.data_ptr())});
  }

  static void multilabel_categorical_crossentropy_backward_out(
      const Tensor& grad_output, const Tensor& scale, const Tensor& statistics, const Tensor& input,
      const Tensor& target, const Optional& target_offsets, const Optional& target_values,
      int64_t target_format, const Optional& mask, const Optional& mask_offsets,
      int64_t mask_format, std::optional<double> ignore_index, const Tensor& threshold,
      const Optional& weight, const Optional& normalizer, int64_t reduction,
      const Tensor& grad_input, const Tensor& grad_threshold) {
    RowwiseProblem problem;
    fill(problem, input,
         {target, target_offsets, target_values, target_format, mask, mask_offsets, mask_format,
          ignore_index},
         normalizer, reduction);
    problem.threshold = vector(threshold);
    problem.weight = vector(weight);
    Backend::multilabel_categorical_crossentropy_backward(
        input, problem,
        {upstream(grad_output), static_cast<const double*>(scale.data_ptr()),
         statistics.data_ptr()},
        {grad_input.data_ptr(), grad_threshold.data_ptr()});
  }
};

}  // namespace mlloss
