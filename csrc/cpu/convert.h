// Conversion of runs of elements between the dtypes of tensors and the arithmetic type.
#pragma once
#include <cstdint>

#include "problem.h"

namespace mlloss::cpu {

// Short rows are written in whole vectors, the rest of which the next row overwrites. That of the
// last row goes here, behind a buffer.
constexpr int kPadding = 64;

// out[i] = data[offset + i * stride], i < count; `offset` and `stride` in elements.
void load(const void* data, Element element, int64_t offset, int64_t stride, int count, float* out);
void load(const void* data, Element element, int64_t offset, int64_t stride, int count,
          double* out);

// The same of short rows, one behind the other: out[r * columns + i] = data[offset + r * row_stride
// + i * stride]. `out` has room for kPadding elements more.
void load_rows(const void* data, Element element, int64_t offset, int64_t row_stride,
               int64_t stride, int rows, int columns, float* out);
void load_rows(const void* data, Element element, int64_t offset, int64_t row_stride,
               int64_t stride, int rows, int columns, double* out);

// out[i] = data[offset + columns[i] * stride], i < count.
void gather(const void* data, Element element, int64_t offset, int64_t stride,
            const int64_t* columns, int count, float* out);
void gather(const void* data, Element element, int64_t offset, int64_t stride,
            const int64_t* columns, int count, double* out);

// data[offset + columns[i]] = values[i], rounded to nearest even; for the dtypes of logits.
void scatter(const float* values, const int64_t* columns, int count, void* data, Element element,
             int64_t offset);
void scatter(const double* values, const int64_t* columns, int count, void* data, Element element,
             int64_t offset);

// data[offset + i] = values[i], rounded to nearest even; for the dtypes of logits.
void store(const float* values, int count, void* data, Element element, int64_t offset);
void store(const double* values, int count, void* data, Element element, int64_t offset);

// Makes a row of a contiguous [N, C] gradient 0.
void zero_row(const Problem& problem, int64_t row, void* grad_input);

// data[offset + i] = 0, i < count; for the dtypes of logits.
void zero_run(void* data, Element element, int64_t offset, int64_t count);

inline int64_t element_size(Element element) {
  switch (element) {
    case Element::kBool:
    case Element::kUint8:
    case Element::kInt8:
      return 1;
    case Element::kHalf:
    case Element::kBFloat16:
      return 2;
    case Element::kInt32:
    case Element::kFloat:
      return 4;
    case Element::kInt64:
    case Element::kDouble:
      return 8;
  }
  return 0;
}

// &data[index].
inline void* element_at(void* data, Element element, int64_t index) {
  return static_cast<char*>(data) + index * element_size(element);
}

// data[index] of an int32 or int64 array.
inline int64_t index_at(const void* data, Element element, int64_t index) {
  return element == Element::kInt32 ? static_cast<const int32_t*>(data)[index]
                                    : static_cast<const int64_t*>(data)[index];
}

}  // namespace mlloss::cpu
