// Whether the ids of sparse labels may be used as they are: one pass over them, where the same
// question to torch's operators takes seven of them, 11 us for a tiny tensor. What is wrong, if
// anything is, mlloss_cuda/targets.py finds out.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/isa.h"
#include "torch_tensor.h"

namespace mlloss {
namespace {

template <class Index>
MLLOSS_INLINE bool fit(const Index* indices, int64_t entries, const Index* offsets, int64_t rows,
                       int64_t num_labels) {
  Index largest = -1;
  for (int64_t i = 0; i < entries; ++i) largest = std::max(largest, indices[i]);
  bool falls = false;
  for (int64_t row = 0; row < rows; ++row) falls |= offsets[row + 1] < offsets[row];
  return largest < num_labels && !falls && offsets[0] == 0 && offsets[rows] == entries;
}

MLLOSS_CLONES bool fit_int32(const int32_t* indices, int64_t entries, const int32_t* offsets,
                             int64_t rows, int64_t num_labels) {
  return fit(indices, entries, offsets, rows, num_labels);
}

MLLOSS_CLONES bool fit_int64(const int64_t* indices, int64_t entries, const int64_t* offsets,
                             int64_t rows, int64_t num_labels) {
  return fit(indices, entries, offsets, rows, num_labels);
}

// `indices` [entries], `offsets` [N + 1], of the same dtype.
bool label_ids_fit(const TorchTensors::Tensor& indices, const TorchTensors::Tensor& offsets,
                   int64_t num_labels) {
  const Element element = TorchTensors::element(indices);
  TorchTensors::check(indices.dim() == 1 && indices.is_contiguous() && offsets.dim() == 1 &&
                          offsets.is_contiguous() && offsets.numel() > 0 &&
                          TorchTensors::element(offsets) == element &&
                          (element == Element::kInt32 || element == Element::kInt64),
                      "label ids and their offsets must be contiguous [entries] and [N + 1], both "
                      "int32 or both int64");
  const int64_t entries = indices.numel(), rows = offsets.numel() - 1;
  if (element == Element::kInt32) {
    return fit_int32(static_cast<const int32_t*>(indices.data_ptr()), entries,
                     static_cast<const int32_t*>(offsets.data_ptr()), rows, num_labels);
  }
  return fit_int64(static_cast<const int64_t*>(indices.data_ptr()), entries,
                   static_cast<const int64_t*>(offsets.data_ptr()), rows, num_labels);
}

}  // namespace
}  // namespace mlloss

STABLE_TORCH_LIBRARY_IMPL(mlloss_cuda, CPU, m) {
  m.impl("label_ids_fit", TORCH_BOX(&mlloss::label_ids_fit));
}
