// A row of logits with its labels, tile by tile.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/convert.h"
#include "cpu/labels.h"
#include "cpu/memory.h"
#include "problem.h"

namespace mlloss::cpu {

// The element type that a tensor has if its numbers need no conversion.
template <class Real>
constexpr Element kElementOf = sizeof(Real) == 8 ? Element::kDouble : Element::kFloat;

template <class Real>
struct Tile {
  int count = 0;
  const Real* logits = nullptr;  // [count]
  LabelTile<Real> labels;
};

// One thread's buffers for decoding tiles.
template <class Real>
class TileReader {
 public:
  // `prefer_hard`, `carrier`: see LabelReader.
  TileReader(const Problem& problem, bool prefer_hard, Carrier carrier = Carrier::kBytes)
      : problem_(problem), labels_(problem, prefer_hard, carrier) {}

  // Columns [begin, end) of a row follow.
  void start_row(int64_t row, int64_t begin, int64_t end) {
    row_ = row;
    end_ = end;
    labels_.start_row(row, begin, end);
  }

  // The next `count` <= kTile columns, from left to right.
  Tile<Real> tile(int64_t begin, int count) {
    prefetch(begin + count, std::min<int64_t>(kTile, end_ - begin - count));
    return {count, logits(begin, count), labels_.tile(begin, count)};
  }

 private:
  const Real* logits(int64_t begin, int count) {
    const int64_t offset = row_ * problem_.row_stride + begin;
    if (problem_.element == kElementOf<Real>) {
      return static_cast<const Real*>(problem_.logits) + offset;
    }
    load(problem_.logits, problem_.element, offset, 1, count, logits_);
    return logits_;
  }

  // Starts fetching the next columns: logits, and dense labels of more than a byte. For bytes this
  // is not worth the instructions but in the fastest loop, which does it on the way.
  void prefetch(int64_t begin, int64_t count) const {
    prefetch_elements(problem_.logits, problem_.element, problem_.row_stride, begin, count);
    const Labels& target = problem_.target;
    if (is_dense(target) && target.column_stride == 1 && element_size(target.element) > 1) {
      prefetch_elements(target.data, target.element, target.row_stride, begin, count);
    }
  }

  void prefetch_elements(const void* data, Element element, int64_t row_stride, int64_t begin,
                         int64_t count) const {
    const int64_t size = element_size(element);
    prefetch_range(static_cast<const char*>(data) + (row_ * row_stride + begin) * size,
                   count * size);
  }

  const Problem& problem_;
  int64_t row_ = 0;
  int64_t end_ = 0;
  LabelReader<Real> labels_;
  alignas(64) Real logits_[kTile];
};

}  // namespace mlloss::cpu
