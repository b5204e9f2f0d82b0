// A row of logits with its labels, tile by tile.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/convert.h"
#include "cpu/isa.h"
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
  const Real* logits = nullptr;  // [count]; nullptr where a reader leaves them as they are stored
  const void* stored = nullptr;  // [count], elements of the type `element`; nullptr if gathered
  Element element = Element::kFloat;
  LabelTile<Real> labels;
};

// `count` elements of a tile of one row, from `begin` on, a multiple of kWordBits.
template <class Real>
MLLOSS_INLINE Tile<Real> part_of(const Tile<Real>& tile, int begin, int count) {
  const auto from = [](auto* data, int place)
                        MLLOSS_INLINE_LAMBDA { return data == nullptr ? data : data + place; };
  Tile<Real> part = tile;
  part.count = count;
  part.logits = from(tile.logits, begin);
  part.stored =
      from(static_cast<const char*>(tile.stored), begin * int(element_size(tile.element)));
  part.labels.hard = from(tile.labels.hard, begin);
  part.labels.soft = from(tile.labels.soft, begin);
  part.labels.observed = from(tile.labels.observed, begin);
  part.labels.hard_bits = from(tile.labels.hard_bits, begin / kWordBits);
  part.labels.observed_bits = from(tile.labels.observed_bits, begin / kWordBits);
  return part;
}

// Calls body(part, begin) for parts of kTile elements; the last may have less.
template <class TileType, class Body>
void for_parts(TileType& tile, const Body& body) {
  if (tile.count <= kTile) return body(tile, 0);
  for (int begin = 0; begin < tile.count; begin += kTile) {
    auto part = part_of(tile, begin, std::min(kTile, tile.count - begin));
    body(part, begin);
  }
}

// One thread's buffers for decoding tiles.
template <class Real>
class TileReader {
 public:
  // `prefer_hard`, `carrier`: see LabelReader. Logits that are not decoded are not fetched ahead
  // either; decode() decodes a tile.
  TileReader(const Problem& problem, bool prefer_hard, Carrier carrier, Logits logits)
      : problem_(problem),
        as_stored_(logits != Logits::kDecoded),
        labels_(problem, prefer_hard, carrier, logits) {}

  // Columns [begin, end) of a row follow.
  void start_row(int64_t row, int64_t begin, int64_t end) {
    row_ = row;
    end_ = end;
    labels_.start_row(row, begin, end);
  }

  // All columns of `rows` rows follow, as one tile that begins at 0; their logits lie one behind
  // the other. Returns false if they have to go row by row.
  bool start_rows(int64_t row, int rows) {
    row_ = row;
    end_ = (problem_.rows - row) * problem_.columns;
    return labels_.start_rows(row, rows);
  }

  // The most columns that are read at a time, after start_row.
  int width() const { return labels_.width(); }

  // Reads the next `count` <= width() columns, from left to right. Into a tile of the caller, since
  // copying what was just written in smaller parts makes the CPU wait.
  void read(int64_t begin, int count, Tile<Real>& tile) {
    prefetch(begin + count, std::min<int64_t>(count, end_ - begin - count));
    const int64_t offset = row_ * problem_.row_stride + begin;
    tile.count = count;
    tile.logits = nullptr;
    tile.element = problem_.element;
    tile.stored = static_cast<const char*>(problem_.logits) + offset * element_size(tile.element);
    labels_.read(begin, count, tile.labels);
    if (!as_stored_) decode_logits(tile);
  }

  // For loops that take logits as numbers and labels as bytes, and tiles that are not wide.
  void decode(Tile<Real>& tile) {
    labels_.expand(tile.labels, tile.count);
    decode_logits(tile);
  }

 private:
  void decode_logits(Tile<Real>& tile) {
    if (tile.element == kElementOf<Real>) {
      tile.logits = static_cast<const Real*>(tile.stored);
    } else {
      load(tile.stored, tile.element, 0, 1, tile.count, logits_);
      tile.logits = logits_;
    }
  }

  // Starts fetching the next columns: logits, and dense labels of more than a byte. For bytes this
  // is not worth the instructions but in the fastest loop, which does it on the way.
  void prefetch(int64_t begin, int64_t count) const {
    if (!as_stored_) {
      prefetch_elements(problem_.logits, problem_.element, problem_.row_stride, begin, count);
    }
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
  const bool as_stored_;
  int64_t row_ = 0;
  int64_t end_ = 0;
  LabelReader<Real> labels_;
  alignas(64) Real logits_[kTile];
};

}  // namespace mlloss::cpu
