// Sparse labels of a row in shared memory, as bits or as numbers: a window of columns at a time.
#pragma once
#include <cstdint>

#include "cuda/vector.cuh"
#include "math/scalar.h"
#include "problem.h"

namespace mlloss::cuda {

// Numbers that are not negative are ordered as their bits are.
__device__ __forceinline__ unsigned bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ unsigned long long bits_of(double value) {
  return static_cast<unsigned long long>(__double_as_longlong(value));
}
__device__ __forceinline__ float real_of(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double real_of(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

// The entries [first, last) of a row.
struct Entries {
  int64_t first = 0, last = 0;
};

// The entries of a row, none if its labels are not sparse; false if the offsets are no valid
// boundaries.
__device__ __forceinline__ bool find_entries(const Labels& labels, int64_t row, Entries& entries) {
  entries = {};
  if (labels.format != Format::kSparse) return true;
  entries.first = index_at(labels.offsets, labels.element, row);
  entries.last = index_at(labels.offsets, labels.element, row + 1);
  return entries.first >= 0 && entries.first <= entries.last && entries.last <= labels.entries;
}

// How one of `width` threads marks entries that lie in a window. All functions return whether one
// of the thread's entries is out of range, wherever the window lies.
struct Marking {
  int64_t columns;  // of the row
  int64_t begin;    // the window's first column
  int places;       // columns of the window
  int rank, width;

  // Sets the bits of labels.
  __device__ __forceinline__ bool bits(const Labels& labels, Entries entries,
                                       unsigned* bitmap) const {
    return for_each(labels, entries, [&](int64_t place, int64_t) {
      atomicOr(&bitmap[place / 32], 1u << (place % 32));
    });
  }

  // Writes the bits of soft targets over zeros. Of duplicates the largest wins. Invalid values
  // become infinite, NaN when they are read.
  template <class Real, class Bits>
  __device__ __forceinline__ bool values(const Labels& labels, Entries entries,
                                         Bits* values) const {
    return for_each(labels, entries, [&](int64_t place, int64_t i) {
      const Real value = load_one<Real>(labels.values, labels.values_element, i);
      atomicMax(&values[place],
                bits_of(value >= 0 && value <= 1 ? value + Real(0) : kInfinity<Real>));
    });
  }

 private:
  template <class Mark>
  __device__ __forceinline__ bool for_each(const Labels& labels, Entries entries,
                                           const Mark& mark) const {
    bool out_of_range = false;
    for (int64_t i = entries.first + rank; i < entries.last; i += width) {
      const int64_t column = index_at(labels.data, labels.element, i);
      const int64_t place = column - begin;
      out_of_range |= column >= columns;
      if (column >= 0 && column < columns && place >= 0 && place < places) mark(place, i);
    }
    return out_of_range;
  }
};

}  // namespace mlloss::cuda
