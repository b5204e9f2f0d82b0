// Reductions over a tile in parallel lanes. Written out because compilers do not vectorise a
// maximum that treats NaN as IEEE comparisons do, and because many lanes keep sums short and so
// exact.
#pragma once
#include "cpu/isa.h"

namespace mlloss::cpu {

// Four AVX-512 vectors of floats: enough independent chains to hide the latency of an addition.
constexpr int kLanes = 64;

// The largest term(i), i < count; NaN is passed over.
template <class Real, class Term>
MLLOSS_INLINE Real lane_max(int count, Real least, const Term& term) {
  alignas(64) Real lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = least;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const Real value = term(i + j);
      lanes[j] = value > lanes[j] ? value : lanes[j];
    }
  }
  for (int j = 0; i < count; ++i, ++j) {
    const Real value = term(i);
    lanes[j] = value > lanes[j] ? value : lanes[j];
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) {
      lanes[j] = lanes[j + width] > lanes[j] ? lanes[j + width] : lanes[j];
    }
  }
  return lanes[0];
}

// The sum of term(i), i < count.
template <class Real, class Term>
MLLOSS_INLINE Real lane_sum(int count, const Term& term) {
  alignas(64) Real lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) lanes[j] += term(i + j);
  }
  for (int j = 0; i < count; ++i, ++j) lanes[j] += term(i);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

}  // namespace mlloss::cpu
