// Reading rows of text: operators on bytes and on the arrays that their ids and values go to. They
// are operators because the library exports nothing else that every Python and torch can call.
#include "cpu/text_rows.h"

#include <torch/csrc/stable/library.h>

#include "torch_tensor.h"

namespace mlloss {
namespace {

using Tensor = TorchTensors::Tensor;

template <class T>
T* data_of(const Tensor& tensor, Element element, int64_t least) {
  TorchTensors::check(tensor.dim() == 1 && tensor.is_contiguous() &&
                          TorchTensors::element(tensor) == element && tensor.numel() >= least,
                      "texts and arrays must be contiguous, of one dimension, of their dtype and "
                      "not too short");
  return static_cast<T*>(tensor.data_ptr());
}

// Text of whole lines; its last line end is what stops the parser.
const char* lines_of(const Tensor& text) {
  const char* data = data_of<const char>(text, Element::kUint8, 1);
  TorchTensors::check(data[text.numel() - 1] == '\n', "a text must end in a line end");
  return data;
}

// Adds line ends, commas, colons, and lines that start with a label or a colon, to `counts` [4].
void count_rows(const Tensor& text, const Tensor& counts) {
  const char* lines = lines_of(text);
  int64_t* sums = data_of<int64_t>(counts, Element::kInt64, 4);
  text::Counts found;
  text::count(lines, text.numel(), found);
  sums[0] += found.line_ends;
  sums[1] += found.commas;
  sums[2] += found.colons;
  sums[3] += found.labelled;
}

// Appends rows to arrays of which `filled` [3] says how many rows, labels and features are taken.
bool parse_rows(const Tensor& text, bool has_labels, int64_t num_features, int64_t num_labels,
                const Tensor& label_ids, const Tensor& label_offsets, const Tensor& feature_ids,
                const Tensor& feature_values, const Tensor& feature_offsets, const Tensor& filled) {
  const char* lines = lines_of(text);
  int64_t* taken = data_of<int64_t>(filled, Element::kInt64, 3);
  text::Rows rows{data_of<int64_t>(label_ids, Element::kInt64, taken[1]),
                  data_of<int64_t>(label_offsets, Element::kInt64, taken[0] + 1),
                  data_of<int64_t>(feature_ids, Element::kInt64, taken[2]),
                  data_of<float>(feature_values, Element::kFloat, feature_ids.numel()),
                  data_of<int64_t>(feature_offsets, Element::kInt64, label_offsets.numel()),
                  label_ids.numel(),
                  feature_ids.numel(),
                  label_offsets.numel() - 1,
                  taken[0],
                  taken[1],
                  taken[2]};
  TorchTensors::check(taken[0] >= 0 && taken[1] >= 0 && taken[2] >= 0,
                      "arrays cannot be filled below their start");
  const bool well_formed =
      text::parse(lines, text.numel(), has_labels, num_features, num_labels, rows);
  taken[0] = rows.rows;
  taken[1] = rows.labels;
  taken[2] = rows.features;
  return well_formed;
}

}  // namespace
}  // namespace mlloss

STABLE_TORCH_LIBRARY_IMPL(mlloss_cuda, CPU, m) {
  m.impl("count_rows", TORCH_BOX(&mlloss::count_rows));
  m.impl("parse_rows", TORCH_BOX(&mlloss::parse_rows));
}
