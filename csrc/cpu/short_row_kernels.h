// The loops of short_rows.h, written with the instructions of AVX-512 and of AVX2.
#pragma once
#include <cstdint>

#include "cpu/labels.h"
#include "math/multilabel_categorical_crossentropy.h"
#include "problem.h"

namespace mlloss::cpu {

// Rows that are finished together: a vector of them.
constexpr int kShortRowRun = 16;

// Numbers in a vector: as many may be written from a row's last one on.
constexpr int kWidestVector = 16;

// Short rows, one behind the other.
struct ShortRowTile {
  const float* logits;      // [rows * columns], and kPadding numbers more
  const uint8_t* hard;      // [rows * columns], nonzero = positive; nullptr = no positives
  const uint8_t* observed;  // [rows * columns], nonzero = use; nullptr = use everything
  int rows, columns;
};

// The ScaledSum of either side of each row: [rows].
struct ShortRowSums {
  alignas(64) float positive_largest[kTile], positive_sum[kTile];
  alignas(64) float negative_largest[kTile], negative_sum[kTile];
};

struct ShortRowKernels {
  // Infinite logits make a sum NaN; the other loops take them.
  void (*sums)(const ShortRowTile& tile, ShortRowSums* sums);
  // scale * dL/dx, `gradients` [rows * columns] with room for kWidestVector more. Returns false if
  // a row needs the other loops.
  bool (*gradients)(const ShortRowTile& tile, const RowStatistics<float>* statistics,
                    const double* scales, float* gradients);
  // Writes numbers as elements of another type. `stream`: past the caches, where they are aligned.
  void (*store)(const float* values, int count, Element element, bool stream, void* out);
};

// Those of this CPU, or nullptr: as vector_kernels().
const ShortRowKernels* short_row_kernels();

}  // namespace mlloss::cpu
