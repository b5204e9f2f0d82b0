// The parser of csrc/cpu/text_rows.h as C functions, to be compiled with sanitizers: fuzz_parser.py
// calls it through ctypes. The text is copied to memory of exactly its size, so that a byte read
// beyond it is found.
#include <cstring>
#include <memory>

#include "cpu/text_rows.h"

using mlloss::text::Counts;
using mlloss::text::Rows;

namespace {

std::unique_ptr<char[]> exactly(const char* text, int64_t size) {
  std::unique_ptr<char[]> copy(new char[size]);
  std::memcpy(copy.get(), text, size);
  return copy;
}

}  // namespace

extern "C" void count_rows(const char* text, int64_t size, int64_t* sums) {
  const auto copy = exactly(text, size);
  Counts counts;
  mlloss::text::count(copy.get(), size, counts);
  const int64_t found[] = {counts.line_ends, counts.commas, counts.colons, counts.labelled};
  std::copy(std::begin(found), std::end(found), sums);
}

// `room`: rows, labels, features; `filled` likewise.
extern "C" bool parse_rows(const char* text, int64_t size, bool has_labels, int64_t num_features,
                           int64_t num_labels, int64_t* label_ids, int64_t* label_offsets,
                           int64_t* feature_ids, float* feature_values, int64_t* feature_offsets,
                           const int64_t* room, int64_t* filled) {
  const auto copy = exactly(text, size);
  Rows rows{label_ids, label_offsets, feature_ids, feature_values, feature_offsets, room[1],
            room[2],   room[0],       filled[0],   filled[1],      filled[2]};
  const bool good =
      mlloss::text::parse(copy.get(), size, has_labels, num_features, num_labels, rows);
  filled[0] = rows.rows;
  filled[1] = rows.labels;
  filled[2] = rows.features;
  return good;
}
