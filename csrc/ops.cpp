// Every operator of torch.ops.mlloss_cuda: the table of contents.
//
// <loss>_out and <loss>_backward_out are the kernels (operators.h, cpu/ops.cpp, cuda/ops.cpp); they
// write into tensors that the caller allocates. <loss> and <loss>_backward are the same as
// functions, with autograd; mlloss_cuda/ops.py implements them on top. Logits are [N, C]
// everywhere.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// How labels are given: dense [N, C] (format 0) or sparse (format 1: label ids [entries], offsets
// [N + 1], values [entries]).
const std::string kLabels =
    "Tensor target, Tensor? target_offsets, Tensor? target_values, int target_format, "
    "Tensor? mask, Tensor? mask_offsets, int mask_format, float? ignore_index, ";

const std::string kSigmoidCrossEntropy =
    "Tensor input, " + kLabels +
    "Tensor? weight, Tensor? pos_weight, float label_smoothing, Tensor? normalizer, int reduction";

const std::string kMultilabelCategoricalCrossentropy =
    "Tensor input, " + kLabels +
    "Tensor threshold, Tensor? weight, Tensor? normalizer, int reduction";

}  // namespace

STABLE_TORCH_LIBRARY(mlloss_cuda, m) {
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };

  define("sigmoid_cross_entropy(" + kSigmoidCrossEntropy + ") -> (Tensor loss, Tensor scale)");
  define("sigmoid_cross_entropy_out(" + kSigmoidCrossEntropy +
         ", Tensor(a!) loss, Tensor(b!) scale) -> ()");
  define("sigmoid_cross_entropy_backward(Tensor grad_output, Tensor scale, " +
         kSigmoidCrossEntropy + ") -> Tensor");
  define("sigmoid_cross_entropy_backward_out(Tensor grad_output, Tensor scale, " +
         kSigmoidCrossEntropy + ", Tensor(a!) grad_input) -> ()");

  define("multilabel_categorical_crossentropy(" + kMultilabelCategoricalCrossentropy +
         ") -> (Tensor loss, Tensor statistics, Tensor scale)");
  define("multilabel_categorical_crossentropy_out(" + kMultilabelCategoricalCrossentropy +
         ", Tensor(a!) loss, Tensor(b!) statistics, Tensor(c!) scale) -> ()");
  define(
      "multilabel_categorical_crossentropy_backward(Tensor grad_output, Tensor scale, "
      "Tensor statistics, " +
      kMultilabelCategoricalCrossentropy + ") -> (Tensor grad_input, Tensor grad_threshold)");
  define(
      "multilabel_categorical_crossentropy_backward_out(Tensor grad_output, Tensor scale, "
      "Tensor statistics, " +
      kMultilabelCategoricalCrossentropy +
      ", Tensor(a!) grad_input, Tensor(b!) grad_threshold) -> ()");
}
