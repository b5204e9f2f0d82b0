// Every operator of torch.ops.mlloss_cuda: the table of contents.
//
// <loss>_out and <loss>_backward_out are the kernels (operators.h, cpu/ops.cpp, cuda/ops.cpp); they
// write into tensors that the caller allocates. <loss>_inplace_out is both in one pass: it writes
// the gradient of the reduced loss, times grad_scale (None = 1), over the logits. <loss> and
// <loss>_backward are the first two as functions, with autograd; mlloss_cuda/ops.py implements them
// on top. Logits are [N, C] everywhere.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// How labels are given: dense [N, C] (format 0), sparse (format 1: label ids [entries], offsets
// [N + 1], values [entries]), packed (format 2: int32 words [N, C / 32 rounded up]), or sparse with
// everything that is not listed missing (format 3, targets only).
const std::string kLabels =
    "Tensor input, Tensor target, Tensor? target_offsets, Tensor? target_values, "
    "int target_format, Tensor? mask, Tensor? mask_offsets, int mask_format, float? ignore_index, ";

const std::string kReduction = "Tensor? normalizer, int reduction";

// The same arguments where `input`, the first one, is written to.
std::string written(const std::string& arguments) {
  return "Tensor(a!)" + arguments.substr(std::string("Tensor").size());
}

}  // namespace

STABLE_TORCH_LIBRARY(mlloss_cuda, m) {
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };

  // Losses that are a sum over elements; losses.h has the same list. `own` stands behind the
  // weight: constants per element [N, C], then numbers.
  const auto define_pointwise = [&](const std::string& name, const std::string& own) {
    const std::string arguments =
        kLabels + "Tensor? weight, " + own + "float label_smoothing, " + kReduction;
    define(name + "(" + arguments + ") -> (Tensor loss, Tensor scale)");
    define(name + "_out(" + arguments + ", Tensor(a!) loss, Tensor(b!) scale) -> ()");
    define(name + "_inplace_out(" + written(arguments) +
           ", Tensor? grad_scale, Tensor(b!) loss, Tensor(c!) scale) -> ()");
    define(name + "_backward(Tensor grad_output, Tensor scale, " + arguments + ") -> Tensor");
    define(name + "_backward_out(Tensor grad_output, Tensor scale, " + arguments +
           ", Tensor(a!) grad_input) -> ()");
  };
  define_pointwise("sigmoid_cross_entropy", "Tensor? pos_weight, ");
  define_pointwise("binary_cross_entropy", "Tensor? pos_weight, float eps, ");
  define_pointwise("sigmoid_focal_loss",
                   "Tensor? pos_weight, Tensor? alpha, Tensor? gamma, "
                   "float positive_alpha, float negative_alpha, float uniform_gamma, ");
  define_pointwise("asymmetric_loss",
                   "float gamma_neg, float gamma_pos, float clip, float detach_focal, ");

  // Losses that are a function of two sums over a row.
  const auto define_rowwise = [&](const std::string& name, bool has_threshold) {
    const std::string arguments =
        kLabels + (has_threshold ? "Tensor threshold, " : "") + "Tensor? weight, " + kReduction;
    const std::string saved = "Tensor grad_output, Tensor scale, Tensor statistics, ";
    define(name + "(" + arguments + ") -> (Tensor loss, Tensor statistics, Tensor scale)");
    define(name + "_out(" + arguments +
           ", Tensor(a!) loss, Tensor(b!) statistics, Tensor(c!) scale) -> ()");
    define(name + "_inplace_out(" + written(arguments) +
           ", Tensor? grad_scale, Tensor(b!) loss, Tensor(c!) statistics, Tensor(d!) scale" +
           (has_threshold ? ", Tensor(e!) grad_threshold" : "") + ") -> ()");
    define(name + "_backward(" + saved + arguments + ") -> " +
           (has_threshold ? "(Tensor grad_input, Tensor grad_threshold)" : "Tensor"));
    define(name + "_backward_out(" + saved + arguments + ", Tensor(a!) grad_input" +
           (has_threshold ? ", Tensor(b!) grad_threshold" : "") + ") -> ()");
  };
  define_rowwise("multilabel_categorical_crossentropy", true);
  define_rowwise("multilabel_ranking_loss", false);

  // The two sums of each row alone (math/row_sums.h), in `sums` [N, 4]; the loss is 0.
  define("row_sums_out(" + kLabels + "Tensor? weight, " + kReduction +
         ", Tensor(a!) loss, Tensor(b!) sums, Tensor(c!) scale) -> ()");

  // Multiplies a gradient that an operator above has written by grad_output / grad_scale; where
  // that is 1, it neither reads nor writes the gradient.
  define("rescale_(Tensor(a!) gradient, Tensor grad_output, Tensor? grad_scale) -> ()");

  // One step of an optimizer for rows of weights (math/optimizer_step.h). States: momentum (sgd) or
  // first moment (adamw) [rows, columns]; second moment [rows, columns] (adamw) or squares [rows]
  // (adagrad); what rounding has left (Kahan) [rows, columns].
  define(
      "optimizer_step_(Tensor(a!) weight, Tensor gradient, Tensor(b!)? first, Tensor(c!)? second, "
      "Tensor(d!)? residual, int rule, int rounding, float lr, float weight_decay, "
      "float momentum, float beta2, float eps, float gradient_factor, int step, int seed, int "
      "first_element) -> ()");

  // The same losses of dense or packed targets and nothing else (cpu/plain.cpp).
  const std::string labels = "Tensor input, Tensor target, int target_format, ";
  const auto define_plain_pointwise = [&](const std::string& name, const std::string& numbers) {
    const std::string arguments = labels + numbers + "int reduction, ";
    define(name + "_plain_out(" + arguments + "Tensor(a!) loss) -> ()");
    define(name + "_plain_backward_out(Tensor grad_output, " + arguments +
           "Tensor(a!) grad_input) -> ()");
  };
  define_plain_pointwise("sigmoid_cross_entropy", "");
  define_plain_pointwise("binary_cross_entropy", "float eps, ");
  define_plain_pointwise("sigmoid_focal_loss",
                         "float positive_alpha, float negative_alpha, float uniform_gamma, ");
  define_plain_pointwise("asymmetric_loss",
                         "float gamma_neg, float gamma_pos, float clip, float detach_focal, ");
  for (const std::string name :
       {"multilabel_categorical_crossentropy", "multilabel_ranking_loss"}) {
    const std::string arguments = labels + "int reduction, ";
    define(name + "_plain_out(" + arguments + "Tensor(a!) loss, Tensor(b!)? statistics) -> ()");
    define(name + "_plain_backward_out(Tensor grad_output, Tensor statistics, " + arguments +
           "Tensor(a!) grad_input) -> ()");
  }

  // Whether ids are below `num_labels` and offsets rise from 0 to their number (cpu/check.cpp).
  define("label_ids_fit(Tensor indices, Tensor offsets, int num_labels) -> bool");

  // Text to arrays (cpu/text_rows.cpp). `text` is uint8, whole lines. `counts` [4]: line ends,
  // commas, colons, lines that start with neither a space nor a tab. `filled` [3]: rows, labels and
  // features that the arrays hold. parse_rows returns whether all rows were well-formed.
  define("count_rows(Tensor text, Tensor(a!) counts) -> ()");
  define(
      "parse_rows(Tensor text, bool has_labels, int num_features, int num_labels, "
      "Tensor(a!) label_ids, Tensor(b!) label_offsets, Tensor(c!) feature_ids, "
      "Tensor(d!) feature_values, Tensor(e!) feature_offsets, Tensor(f!) filled) -> bool");
}
