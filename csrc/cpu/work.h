// How a matrix is cut into pieces of work. The cut depends on shapes alone, never on the number of
// threads, and partial results are combined in the order of the pieces: the same input gives the
// same bits however many threads there are.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace mlloss::cpu {

// Elements in one piece: enough to hide the cost of handing it out, few enough to share evenly.
constexpr int64_t kPiece = int64_t(1) << 16;

// Rows [row_begin, row_end), and of each the columns [column_begin, column_end).
struct Piece {
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
};

// Short rows go together, long rows are split.
class Pieces {
 public:
  Pieces(int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        rows_per_piece_(std::max<int64_t>(1, kPiece / std::max<int64_t>(columns, 1))),
        per_row_(std::max<int64_t>(1, (columns + kPiece - 1) / kPiece)) {}

  // No row is split; `cost` is the work of a row, in elements.
  static Pieces of_rows(int64_t rows, int64_t columns, int64_t cost) {
    Pieces pieces(rows, cost);
    pieces.columns_ = columns;
    pieces.per_row_ = 1;
    return pieces;
  }

  int64_t count() const {
    return per_row_ > 1 ? rows_ * per_row_ : (rows_ + rows_per_piece_ - 1) / rows_per_piece_;
  }

  // The same with multiples of so many rows in a piece.
  Pieces of_groups(int64_t rows) const {
    Pieces pieces = *this;
    pieces.rows_per_piece_ = std::max<int64_t>(1, rows_per_piece_ / rows) * rows;
    return pieces;
  }

  // Pieces that a row is split into.
  int64_t per_row() const { return per_row_; }

  Piece operator[](int64_t index) const {
    if (per_row_ > 1) {
      const int64_t row = index / per_row_;
      const int64_t begin = index % per_row_ * kPiece;
      return {row, row + 1, begin, std::min(begin + kPiece, columns_)};
    }
    const int64_t begin = index * rows_per_piece_;
    return {begin, std::min(begin + rows_per_piece_, rows_), 0, columns_};
  }

 private:
  int64_t rows_, columns_, rows_per_piece_, per_row_;
};

// Calls body(first, last) on ranges of the piece numbers [begin, end), in parallel.
template <class Body>
void for_pieces(int64_t begin, int64_t end, const Body& body) {
  if (end - begin <= 1) {
    body(begin, end);
  } else {
    torch::stable::parallel_for(begin, end, 1, body);
  }
}

template <class Body>
void for_pieces(const Pieces& pieces, const Body& body) {
  for_pieces(int64_t(0), pieces.count(), body);
}

}  // namespace mlloss::cpu
