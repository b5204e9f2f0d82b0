// The loops of VectorKernels over the vectors of one instruction set; included by
// vector_kernels.cpp once for each. Vectors are taken four at a time, as a group: independent
// chains of additions hide their latency.
constexpr int kVectors = 4;
constexpr int kGroup = kVectors * kWidth;
constexpr uint64_t kFull = kGroup == 64 ? ~uint64_t(0) : (uint64_t(1) << (kGroup % 64)) - 1;

// Labels of `count` elements as bits, from element i on; the rest of the bits is 0.
MLLOSS_VECTOR uint64_t label_bits(const uint8_t* bytes, const uint32_t* words, int i, int count) {
  if (words == nullptr) return bits_of(bytes + i, count);
  uint64_t bits = words[i / kWordBits];
  if (count > kWordBits) bits |= uint64_t(words[i / kWordBits + 1]) << kWordBits;
  return count < kGroup ? bits & ((uint64_t(1) << count) - 1) : bits;
}

// The elements [begin, begin + kGroup) of a tile; at its end, a copy filled up with zeros that are
// not observed.
template <class Stored>
struct Group {
  const Stored* logits;
  const float* soft;
  uint64_t hard = 0;
  uint64_t observed = kFull;
};

// Calls body(group, begin, count) for the groups of a tile. kSoft: with soft targets.
template <bool kSoft, class Stored, class Body>
MLLOSS_VECTOR void for_groups(const Tile<float>& tile, const Body& body) {
  const auto* logits = static_cast<const Stored*>(tile.stored);
  const LabelTile<float> labels = tile.labels;
  const bool is_hard = labels.kind == TargetKind::kHard;
  const bool is_masked = labels.observed != nullptr || labels.observed_bits != nullptr;
  alignas(64) Stored last_logits[kGroup];
  alignas(64) float last_soft[kGroup];
  for (int i = 0; i < tile.count; i += kGroup) {
    const int count = tile.count - i < kGroup ? tile.count - i : kGroup;
    Group<Stored> group{logits + i, kSoft ? labels.soft + i : nullptr};
    if (is_hard) group.hard = label_bits(labels.hard, labels.hard_bits, i, count);
    if (is_masked) group.observed = label_bits(labels.observed, labels.observed_bits, i, count);
    if (count == kGroup) {
      for (int line = 0; line < kGroup * int(sizeof(Stored)); line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(logits + i) + line + kPrefetch, _MM_HINT_T0);
      }
      // As far ahead in elements; prefetching never faults.
      constexpr int kAhead = kPrefetch / int(sizeof(Stored));
      if (is_hard && labels.hard != nullptr) __builtin_prefetch(labels.hard + i + kAhead);
      if (is_masked && labels.observed != nullptr) __builtin_prefetch(labels.observed + i + kAhead);
    } else {
      copy_padded(logits + i, count * sizeof(Stored), sizeof last_logits, last_logits);
      group.logits = last_logits;
      if (!is_masked) group.observed = (uint64_t(1) << count) - 1;
      if constexpr (kSoft) {
        copy_padded(labels.soft + i, count * sizeof(float), sizeof last_soft, last_soft);
        group.soft = last_soft;
      }
    }
    body(group, i, count);
  }
}

// Writes values(j), the vectors of a group of gradients.
template <class Stored, class Values>
MLLOSS_VECTOR void store_group(const Values& values, int begin, int count, bool stream,
                               Stored* gradients) {
  alignas(64) Stored last[kGroup];
  Stored* out = count == kGroup ? gradients + begin : last;
  stream = stream && count == kGroup;
  for (int j = 0; j < kVectors; j += 2) {
    store_pair(values(j), values(j + 1), stream, out + j * kWidth);
  }
  if (count < kGroup) std::memcpy(gradients + begin, last, count * sizeof(Stored));
}

// Streaming takes aligned addresses only.
MLLOSS_VECTOR bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 64 == 0;
}

#define MLLOSS_VECTOR_LAMBDA __attribute__((always_inline, MLLOSS_TARGET))

// ---- Softplus ----

// See add_to_lanes in pointwise.h.
template <bool kSoft, class Stored>
MLLOSS_VECTOR double softplus_sum_of(const Tile<float>& tile) {
  Floats q[kVectors], linear[kVectors];
  for (int j = 0; j < kVectors; ++j) q[j] = linear[j] = all(0);
  for_groups<kSoft, Stored>(tile, [&](const Group<Stored>& group, int, int) MLLOSS_VECTOR_LAMBDA {
    if (group.observed == 0) return;  // common where few labels are observed
    if (!kSoft && group.hard == 0 && group.observed == kFull) {
      // As nearly everywhere among many labels.
      for (int j = 0; j < kVectors; ++j) {
        const Floats x = load(group.logits + j * kWidth);
        const Floats e = exponential(minus_absolute(x));
        q[j] = multiply_add(q[j], e, add(q[j], e));
        linear[j] = add(linear[j], maximum(all(0), x));
      }
      return;
    }
    for (int j = 0; j < kVectors; ++j) {
      const Mask observed = mask_from(group.observed, j);
      const Floats x = load(group.logits + j * kWidth);
      const Floats e = keep(observed, exponential(minus_absolute(x)));
      Floats part;
      if (kSoft) {
        const Floats y = load(group.soft + j * kWidth);
        const Floats factor = subtract(select(is_negative(x), all(0), all(1)), y);
        // Selected: an infinite logit on its right side costs 0.
        part = select(is_zero(factor), all(0), multiply(factor, x));
      } else {
        part = maximum(all(0), flip_sign(mask_from(group.hard, j), x));
      }
      q[j] = multiply_add(q[j], e, add(q[j], e));
      linear[j] = add(linear[j], keep(observed, part));
    }
  });
  // A lane has seen kTile / kGroup elements, so q < 2^(kTile / kGroup): two lanes fit together
  // where that stays below what a float holds.
  constexpr int kLogarithms = 2 * (kTile / kGroup) < 100 ? kVectors / 2 : kVectors;
  alignas(64) float arguments[kLogarithms * kWidth];
  for (int j = 0; j < kLogarithms; ++j) {
    Floats product = q[j];
    if constexpr (kLogarithms < kVectors) {
      const Floats other = q[j + kLogarithms];
      product = multiply_add(product, other, add(product, other));
    }
    store(product, arguments + j * kWidth);
  }
  return sum_of(add(add(linear[0], linear[1]), add(linear[2], linear[3]))) +
         sum_of_logarithms(arguments, kLogarithms * kWidth);
}

// factor * sigmoid(x)
MLLOSS_VECTOR Floats scaled_sigmoid(Floats x, Floats factor) {
  const Floats e = exponential(minus_absolute(x));
  return divide(select(is_negative(x), multiply(factor, e), factor), add(all(1), e));
}

// The gradient of softplus(z) without weights.
template <bool kSoft, class Stored>
MLLOSS_VECTOR void softplus_gradients_of(const Tile<float>& tile, float scale, bool stream,
                                         void* gradients) {
  auto* out = static_cast<Stored*>(gradients);
  stream = stream && is_aligned(out);
  for_groups<kSoft, Stored>(
      tile, [&](const Group<Stored>& group, int begin, int count) MLLOSS_VECTOR_LAMBDA {
        if (!kSoft && group.hard == 0 && group.observed == kFull) {
          const auto negatives = [&](int j) MLLOSS_VECTOR_LAMBDA {
            return scaled_sigmoid(load(group.logits + j * kWidth), all(scale));
          };
          store_group(negatives, begin, count, stream, out);
          return;
        }
        const auto any = [&](int j) MLLOSS_VECTOR_LAMBDA {
          const Floats x = load(group.logits + j * kWidth);
          const Mask observed = mask_from(group.observed, j);
          if (kSoft) {
            // (1 - y) sigmoid(x) - y sigmoid(-x)
            const Floats y = load(group.soft + j * kWidth);
            const Floats e = exponential(minus_absolute(x));
            const Floats large = divide(all(1), add(all(1), e));
            const Floats small = multiply(e, large);
            const Floats p = select(is_negative(x), small, large);
            const Floats q = select(is_negative(x), large, small);
            const Floats value = subtract(multiply(subtract(all(1), y), p), multiply(y, q));
            return keep(observed, multiply(all(scale), value));
          }
          // The sign of positives is flipped, and flipped back.
          const Mask hard = mask_from(group.hard, j);
          return keep(observed, flip_sign(hard, scaled_sigmoid(flip_sign(hard, x), all(scale))));
        };
        store_group(any, begin, count, stream, out);
      });
}

// ---- Sums of exponentials ----

// See sums_of_tile in rowwise.h.
template <class Stored>
MLLOSS_VECTOR bool exponential_sums_of(const Tile<float>& tile, RowSums<double>* sums) {
  // First the largest value of either side, positives with their sign flipped; the tile stays in
  // the L1 cache.
  const Floats nothing = all(-kInfinity<float>);
  Floats positive[kVectors], negative[kVectors];
  for (int j = 0; j < kVectors; ++j) positive[j] = negative[j] = nothing;
  uint64_t positives[kTile / kGroup], negatives[kTile / kGroup];
  uint64_t any_positive = 0, any_negative = 0;
  for_groups<false, Stored>(
      tile, [&](const Group<Stored>& group, int begin, int) MLLOSS_VECTOR_LAMBDA {
        const uint64_t hard = group.observed & group.hard;
        const uint64_t rest = group.observed & ~group.hard;
        positives[begin / kGroup] = hard;
        negatives[begin / kGroup] = rest;
        any_positive |= hard;
        any_negative |= rest;
        for (int j = 0; j < kVectors; ++j) {
          const Floats x = load(group.logits + j * kWidth);
          const Floats own = rest == kFull ? x : select(mask_from(rest, j), x, nothing);
          negative[j] = maximum(own, negative[j]);
          if (hard == 0) continue;
          positive[j] = maximum(select(mask_from(hard, j), negate(x), nothing), positive[j]);
        }
      });
  const auto largest_of = [](const Floats* lanes) MLLOSS_VECTOR_LAMBDA {
    return maximum_of(maximum(maximum(lanes[0], lanes[1]), maximum(lanes[2], lanes[3])));
  };
  const float positive_shift = largest_of(positive), negative_shift = largest_of(negative);
  if ((any_positive != 0 && absolute(positive_shift) == kInfinity<float>) ||
      (any_negative != 0 && absolute(negative_shift) == kInfinity<float>)) {
    return false;
  }
  for (int j = 0; j < kVectors; ++j) positive[j] = negative[j] = all(0);
  Tile<float> unlabelled = tile;
  unlabelled.labels = {};
  for_groups<false, Stored>(
      unlabelled, [&](const Group<Stored>& group, int begin, int) MLLOSS_VECTOR_LAMBDA {
        const uint64_t hard = positives[begin / kGroup];
        const uint64_t rest = negatives[begin / kGroup];
        if ((hard | rest) == 0) return;
        for (int j = 0; j < kVectors; ++j) {
          const Floats x = load(group.logits + j * kWidth);
          // What is left out may be larger than the shift; it is dropped.
          if (hard == 0) {
            const Floats e = exponential(subtract(x, all(negative_shift)));
            negative[j] = add(negative[j], rest == kFull ? e : keep(mask_from(rest, j), e));
          } else {
            const Mask is_positive = mask_from(hard, j);
            const Floats shift = select(is_positive, all(positive_shift), all(negative_shift));
            const Floats e = exponential(subtract(flip_sign(is_positive, x), shift));
            positive[j] = add(positive[j], keep(is_positive, e));
            negative[j] = add(negative[j], keep(mask_from(rest, j), e));
          }
        }
      });
  const auto sum_over = [](const Floats* lanes) MLLOSS_VECTOR_LAMBDA {
    return sum_of(add(add(lanes[0], lanes[1]), add(lanes[2], lanes[3])));
  };
  sums->positive = ScaledSum<double>{positive_shift, sum_over(positive)};
  sums->negative = ScaledSum<double>{negative_shift, sum_over(negative)};
  return true;
}

// See gradients_of_tile in rowwise.h.
template <class Stored>
MLLOSS_VECTOR void exponential_gradients_of(const Tile<float>& tile,
                                            const RowStatistics<float>& statistics, float scale,
                                            bool stream, void* gradients) {
  auto* out = static_cast<Stored*>(gradients);
  stream = stream && is_aligned(out);
  const float positive_factor = -scale * statistics.positive_factor;
  const float negative_factor = scale * statistics.negative_factor;
  for_groups<false, Stored>(
      tile, [&](const Group<Stored>& group, int begin, int count) MLLOSS_VECTOR_LAMBDA {
        const Floats shift = all(statistics.negative_shift);
        const auto negative = [&](int j) MLLOSS_VECTOR_LAMBDA {
          const Floats e = exponential(subtract(load(group.logits + j * kWidth), shift));
          return multiply(all(negative_factor), e);
        };
        const auto any = [&](int j) MLLOSS_VECTOR_LAMBDA {
          const Mask hard = mask_from(group.hard, j);
          const Floats x = flip_sign(hard, load(group.logits + j * kWidth));
          const Floats own = select(hard, all(statistics.positive_shift), shift);
          const Floats factor = select(hard, all(positive_factor), all(negative_factor));
          const Floats value = multiply(factor, exponential(subtract(x, own)));
          return keep(mask_from(group.observed, j), value);
        };
        if (group.hard == 0 && group.observed == kFull) {
          store_group(negative, begin, count, stream, out);
        } else {
          store_group(any, begin, count, stream, out);
        }
      });
}

// ---- Entry points ----

// Calls run(Stored{}) with the element type of a tile's logits.
template <class Run>
MLLOSS_VECTOR void dispatch(const Tile<float>& tile, const Run& run) {
  switch (tile.element) {
    case Element::kHalf:
      return run(Half{});
    case Element::kBFloat16:
      return run(BFloat16{});
    default:
      return run(float{});
  }
}

__attribute__((MLLOSS_TARGET)) double softplus_sum(const Tile<float>& tile) {
  double sum = 0;
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    using Stored = decltype(stored);
    sum = tile.labels.kind == TargetKind::kSoft ? softplus_sum_of<true, Stored>(tile)
                                                : softplus_sum_of<false, Stored>(tile);
  });
  return sum;
}

__attribute__((MLLOSS_TARGET)) void softplus_gradients(const Tile<float>& tile, float scale,
                                                       bool stream, void* gradients) {
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    using Stored = decltype(stored);
    if (tile.labels.kind == TargetKind::kSoft) {
      softplus_gradients_of<true, Stored>(tile, scale, stream, gradients);
    } else {
      softplus_gradients_of<false, Stored>(tile, scale, stream, gradients);
    }
  });
}

__attribute__((MLLOSS_TARGET)) bool exponential_sums(const Tile<float>& tile,
                                                     RowSums<double>* sums) {
  bool done = false;
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    done = exponential_sums_of<decltype(stored)>(tile, sums);
  });
  return done;
}

__attribute__((MLLOSS_TARGET)) bool exponential_gradients(const Tile<float>& tile,
                                                          const RowStatistics<float>& statistics,
                                                          float scale, bool stream,
                                                          void* gradients) {
  // Where a sum is infinite the differences to its shift may be positive.
  if (statistics.positive_factor == 0 || statistics.negative_factor == 0) return false;
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    exponential_gradients_of<decltype(stored)>(tile, statistics, scale, stream, gradients);
  });
  return true;
}

__attribute__((MLLOSS_TARGET)) int64_t count_observed(const Tile<float>& tile) {
  const LabelTile<float>& labels = tile.labels;
  int64_t total = 0;
  for (int i = 0; i < tile.count; i += kGroup) {
    const int count = tile.count - i < kGroup ? tile.count - i : kGroup;
    total += __builtin_popcountll(label_bits(labels.observed, labels.observed_bits, i, count));
  }
  return total;
}

__attribute__((MLLOSS_TARGET)) void fence() { _mm_sfence(); }

constexpr VectorKernels kKernels = {softplus_sum,          softplus_gradients, exponential_sums,
                                    exponential_gradients, count_observed,     fence};

#undef MLLOSS_VECTOR_LAMBDA
