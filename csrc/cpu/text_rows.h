// Rows of text, `label,label feature:value feature:value`, as arrays of ids and values. What is
// well-formed, mlloss_cuda/xmc/data/row_parser.py says, line by line and with reasons; this is the
// same again, fast, and only knows right from wrong. Plain C++, of no locale, no torch.
//
// Values are what the decimal text rounds to in fp64, rounded to fp32. std::from_chars could do the
// first step, but needs the C++ library of GCC 11 at run time (GLIBCXX_3.4.29), where everything
// else here is content with that of GCC 5.
//
// 781 MB of text in a second where values have 6 digits, 906 MB where they have 17, the file read
// twice included; the parser in NumPy: 65, scikit-learn's: 65 (one thread of an AMD EPYC,
// 2026-11-21, bench/parsing.py).
#pragma once
#include <locale.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>
#include <vector>

namespace mlloss::text {

// What a text holds, counted to allocate arrays before it is parsed.
struct Counts {
  int64_t line_ends = 0;
  int64_t commas = 0;
  int64_t colons = 0;
  int64_t labelled = 0;  // lines that start with neither a space nor a tab
};

// Where parsed rows go. Row i has the labels from label_offsets[i] to label_offsets[i + 1], and
// its features likewise; both offsets start with a 0 that is there already.
struct Rows {
  int64_t* label_ids;        // [label_capacity], ascending and without duplicates in a row
  int64_t* label_offsets;    // [row_capacity + 1]
  int64_t* feature_ids;      // [feature_capacity], in the order of the text
  float* feature_values;     // [feature_capacity]
  int64_t* feature_offsets;  // [row_capacity + 1]
  int64_t label_capacity, feature_capacity, row_capacity;
  int64_t rows = 0, labels = 0, features = 0;  // filled so far
};

inline bool is_digit(char c) { return static_cast<unsigned char>(c - '0') < 10; }
inline bool is_space(char c) { return c == ' ' || c == '\t'; }

// `size` bytes of whole lines. Bytes are summed up in bytes, as vectors do best, hence in pieces
// that are too short for a sum to overflow.
inline void count(const char* text, int64_t size, Counts& counts) {
  constexpr int64_t kPiece = 128;
  char before = '\n';
  for (int64_t start = 0; start < size; start += kPiece) {
    const int64_t length = std::min(kPiece, size - start);
    const char* piece = text + start;
    uint8_t line_ends = 0, commas = 0, colons = 0, labelled = 0;
    for (int64_t i = 0; i < length; ++i) {
      line_ends += piece[i] == '\n';
      commas += piece[i] == ',';
      colons += piece[i] == ':';
    }
    labelled += before == '\n' && !is_space(piece[0]);
    for (int64_t i = 1; i < length; ++i) {
      labelled += (piece[i - 1] == '\n') & (piece[i] != ' ') & (piece[i] != '\t');
    }
    before = piece[length - 1];
    counts.line_ends += line_ends;
    counts.commas += commas;
    counts.colons += colons;
    counts.labelled += labelled;
  }
}

// All functions that read something move `text` behind it. A line end behind the last line stops
// every loop over digits and spaces.

// False if there are no digits. What exceeds 18 digits comes out as the largest number.
inline bool read_integer(const char*& text, int64_t& number) {
  const char* start = text;
  uint64_t sum = 0;
  while (is_digit(*text)) sum = 10 * sum + static_cast<uint64_t>(*text++ - '0');
  if (text == start) return false;
  if (text - start > 18) {
    while (*start == '0') ++start;
    if (text - start > 18) sum = std::numeric_limits<int64_t>::max();
  }
  number = static_cast<int64_t>(sum);
  return true;
}

// The C library's conversion rounds correctly, but takes its decimal point from a locale and needs
// a zero byte at the end.
inline double slow_value(const char* start, const char* end) {
  static const locale_t locale = newlocale(LC_ALL_MASK, "C", nullptr);
  if (locale == nullptr) throw std::bad_alloc();
  return strtod_l(std::string(start, end).c_str(), nullptr, locale);
}

// [+-]digits.digits[e[+-]digits], the digits on one side of the point at least; false for anything
// else and for what rounds to infinity in fp32.
inline bool read_value(const char*& text, float& value) {
  static constexpr double kPowers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                       1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
                                       1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};  // all exact
  constexpr int64_t kLargestPower = 22, kDigits = 19;  // 10^19 - 1 fits 64 bits
  const char* start = text;
  const bool is_negative = *text == '-';
  if (is_negative || *text == '+') ++text;
  const char* digits = text;
  uint64_t mantissa = 0;
  while (is_digit(*text)) mantissa = 10 * mantissa + static_cast<uint64_t>(*text++ - '0');
  int64_t num_digits = text - digits, exponent = 0;
  if (*text == '.') {
    const char* fraction = ++text;
    while (is_digit(*text)) mantissa = 10 * mantissa + static_cast<uint64_t>(*text++ - '0');
    exponent = fraction - text;
    num_digits -= exponent;
  }
  if (num_digits == 0) return false;
  if (*text == 'e' || *text == 'E') {
    ++text;
    const bool is_below_one = *text == '-';
    if (is_below_one || *text == '+') ++text;
    int64_t written;
    if (!read_integer(text, written)) return false;
    written = std::min<int64_t>(written, int64_t{1} << 40);
    exponent += is_below_one ? -written : written;
  }
  if (num_digits > kDigits) {  // leading zeros do not count
    for (; *digits == '0' || *digits == '.'; ++digits) num_digits -= *digits == '0';
  }

  if (num_digits > kDigits || exponent < -kLargestPower || exponent > kLargestPower) {
    value = static_cast<float>(slow_value(start, text));
    return std::isfinite(value);
  }
  double magnitude = static_cast<double>(mantissa);
  magnitude = exponent < 0 ? magnitude / kPowers[-exponent] : magnitude * kPowers[exponent];
  value = static_cast<float>(magnitude);
  if (mantissa > uint64_t{1} << 53) {
    // Two roundings, each by up to 2^-53: not the nearest fp64 number perhaps, but one so close to
    // the true value that both nearly always are the same number in fp32.
    constexpr double kError = 0x1p-50;
    if (static_cast<float>(magnitude * (1 - kError)) !=
        static_cast<float>(magnitude * (1 + kError))) {
      value = static_cast<float>(std::abs(slow_value(start, text)));
    }
  }
  if (is_negative) value = -value;
  return std::isfinite(value);
}

inline bool has_duplicates(const int64_t* ids, int64_t size, std::vector<int64_t>& scratch) {
  scratch.assign(ids, ids + size);
  std::sort(scratch.begin(), scratch.end());
  return std::adjacent_find(scratch.begin(), scratch.end()) != scratch.end();
}

// Appends the rows of `size` bytes of whole lines. Without `has_labels`, rows are features alone,
// and lines may be empty. False, with the rows before it taken, for a row that is not well-formed
// or does not fit.
inline bool parse(const char* text, int64_t size, bool has_labels, int64_t num_features,
                  int64_t num_labels, Rows& out) {
  const char* end = text + size;
  std::vector<int64_t> scratch;
  while (text != end) {
    if (out.rows == out.row_capacity) return false;
    int64_t labels = out.labels, features = out.features, last = -1;
    bool ascending = true;
    if (has_labels) {
      if (is_digit(*text)) {
        for (;; ++text) {
          int64_t id;
          if (!read_integer(text, id) || id >= num_labels) return false;
          if (labels == out.label_capacity) return false;
          ascending &= id > last;
          last = out.label_ids[labels++] = id;
          if (*text != ',') break;
        }
        if (!is_space(*text) && *text != '\n') return false;
      } else if (!is_space(*text)) {
        return false;
      }
      if (!ascending) {
        int64_t* first = out.label_ids + out.labels;
        std::sort(first, out.label_ids + labels);
        labels = std::unique(first, out.label_ids + labels) - out.label_ids;
      }
    }
    last = -1;
    ascending = true;
    for (;;) {
      while (is_space(*text)) ++text;
      if (*text == '\n') break;
      int64_t id;
      if (!read_integer(text, id) || id >= num_features || *text != ':') return false;
      float value;
      if (!read_value(++text, value) || (!is_space(*text) && *text != '\n')) return false;
      if (features == out.feature_capacity) return false;
      ascending &= id > last;
      last = out.feature_ids[features] = id;
      out.feature_values[features++] = value;
    }
    ++text;
    if (!ascending &&
        has_duplicates(out.feature_ids + out.features, features - out.features, scratch)) {
      return false;
    }
    ++out.rows;
    out.label_offsets[out.rows] = out.labels = labels;
    out.feature_offsets[out.rows] = out.features = features;
  }
  return true;
}

}  // namespace mlloss::text
