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

// Calls body(group, begin, count) for the groups of a tile. kSoft: with soft targets. kFetches:
// also fetches ahead what memory holds behind the tile.
template <bool kSoft, bool kFetches, class Stored, class Body>
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
    if (count == kGroup && kFetches) {
      for (int line = 0; line < kGroup * int(sizeof(Stored)); line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(logits + i) + line + kPrefetch, _MM_HINT_T0);
      }
      // As far ahead in elements; prefetching never faults.
      constexpr int kAhead = kPrefetch / int(sizeof(Stored));
      if (is_hard && labels.hard != nullptr) __builtin_prefetch(labels.hard + i + kAhead);
      if (is_masked && labels.observed != nullptr) __builtin_prefetch(labels.observed + i + kAhead);
    } else if (count < kGroup) {
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

// NaN that is safe to be rounded to bf16: a product takes over the bits of one that it meets.
MLLOSS_VECTOR float quiet_scale(float scale) { return scale != scale ? kNaN<float> : scale; }

// Streaming takes aligned addresses only.
MLLOSS_VECTOR bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 64 == 0;
}

#define MLLOSS_VECTOR_LAMBDA __attribute__((always_inline, MLLOSS_TARGET))

// ---- Softplus ----

// What a vector of a group needs: whether elements are left out, and whether signs are flipped.
template <bool kMasked, bool kFlipped>
struct Needs {
  static constexpr bool masked = kMasked;
  static constexpr bool flipped = kFlipped;
};

// Calls run(needs) with the least that a group of hard targets needs: nothing, nearly everywhere
// among many labels.
template <class Stored, class Run>
MLLOSS_VECTOR void with_needs(const Group<Stored>& group, const Run& run) {
  if (group.hard == 0) {
    group.observed == kFull ? run(Needs<false, false>{}) : run(Needs<true, false>{});
  } else {
    group.observed == kFull ? run(Needs<false, true>{}) : run(Needs<true, true>{});
  }
}

// log(1 + q), q >= 0: as log1p_nonnegative in math/scalar.h.
MLLOSS_VECTOR Floats log1p_of(Floats q) {
  const Floats u = add(all(1), q);
  // What rounding dropped. NaN goes its way through here.
  const Floats lost = select(is_negative(subtract(q, all(1))), subtract(q, subtract(u, all(1))),
                             subtract(all(1), subtract(u, q)));
  const Parts parts = parts_of(u);
  const Floats f = multiply_add(lost, parts.inverse_power, subtract(parts.rest, all(1)));
  Floats p = all(kLogarithm[0]);
  for (int i = 1; i < 9; ++i) p = multiply_add(p, f, all(kLogarithm[i]));
  const Floats square = multiply(f, f);
  Floats y = multiply_add(parts.exponent, all(-2.12194440e-4f), multiply(multiply(p, f), square));
  y = multiply_add(all(-0.5f), square, y);
  return multiply_add(parts.exponent, all(0.693359375f), add(f, y));
}

// log(1 + e) for 0 <= e <= 1.
MLLOSS_VECTOR Floats log1p_below_one(Floats e) {
  Floats p = all(kLog1p[0]);
  for (int i = 1; i < 9; ++i) p = multiply_add(p, e, all(kLog1p[i]));
  return multiply(p, e);
}

// See add_to_lanes in pointwise.h.
template <bool kSoft, class Stored>
MLLOSS_VECTOR double softplus_sum_of(const Tile<float>& tile) {
  Floats q[kVectors], linear[kVectors];
  for (int j = 0; j < kVectors; ++j) q[j] = linear[j] = all(0);
  for_groups<kSoft, true, Stored>(
      tile, [&](const Group<Stored>& group, int, int) MLLOSS_VECTOR_LAMBDA {
        if (group.observed == 0) return;  // common where few labels are observed
        Floats e[kVectors];
        if constexpr (kSoft) {
          for (int j = 0; j < kVectors; ++j) {
            const Mask observed = mask_from(group.observed, j);
            const Floats x = load(group.logits + j * kWidth);
            const Floats y = load(group.soft + j * kWidth);
            const Floats factor = subtract(select(is_negative(x), all(0), all(1)), y);
            // Selected: an infinite logit on its right side costs 0.
            const Floats part = select(is_zero(factor), all(0), multiply(factor, x));
            linear[j] = add(linear[j], keep(observed, part));
            // NaN has to stay: beside it, the linear part may be 0.
            e[j] = keep(observed, exponential(minus_absolute(x)));
          }
        } else {
          with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
            for (int j = 0; j < kVectors; ++j) {
              Floats x = load(group.logits + j * kWidth);
              if (needs.flipped) x = flip_sign(mask_from(group.hard, j), x);
              // A negative at -inf costs nothing.
              if (needs.masked) x = select(mask_from(group.observed, j), x, all(-kInfinity<float>));
              linear[j] = add(linear[j], maximum(all(0), x));
              e[j] = x;
            }
          });
          exponentials_of_size(e);
        }
        for (int j = 0; j < kVectors; ++j) q[j] = multiply_add(q[j], e[j], add(q[j], e[j]));
      });
  // A lane has seen kTile / kGroup elements, so q < 2^(kTile / kGroup): two lanes fit together
  // where that stays below what a float holds.
  constexpr int kLogarithms = 2 * (kTile / kGroup) < 100 ? kVectors / 2 : kVectors;
  Floats logarithm = all(0);
  for (int j = 0; j < kLogarithms; ++j) {
    Floats product = q[j];
    if constexpr (kLogarithms < kVectors) {
      const Floats other = q[j + kLogarithms];
      product = multiply_add(product, other, add(product, other));
    }
    logarithm = add(logarithm, log1p_of(product));
  }
  return sum_of(add(add(add(linear[0], linear[1]), add(linear[2], linear[3])), logarithm));
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
  scale = quiet_scale(scale);
  for_groups<kSoft, true, Stored>(
      tile, [&](const Group<Stored>& group, int begin, int count) MLLOSS_VECTOR_LAMBDA {
        if constexpr (kSoft) {
          const auto gradient = [&](int j) MLLOSS_VECTOR_LAMBDA {
            // (1 - y) sigmoid(x) - y sigmoid(-x)
            const Floats x = load(group.logits + j * kWidth);
            const Floats y = load(group.soft + j * kWidth);
            const Floats e = exponential(minus_absolute(x));
            const Floats large = divide(all(1), add(all(1), e));
            const Floats small = multiply(e, large);
            const Floats p = select(is_negative(x), small, large);
            const Floats q = select(is_negative(x), large, small);
            const Floats value = subtract(multiply(subtract(all(1), y), p), multiply(y, q));
            return keep(mask_from(group.observed, j), multiply(all(scale), value));
          };
          store_group(gradient, begin, count, stream, out);
        } else {
          with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
            const auto gradient = [&](int j) MLLOSS_VECTOR_LAMBDA {
              Floats x = load(group.logits + j * kWidth);
              // The sign of positives is flipped, and flipped back.
              if (needs.flipped) x = flip_sign(mask_from(group.hard, j), x);
              Floats value = scaled_sigmoid(x, all(scale));
              if (needs.flipped) value = flip_sign(mask_from(group.hard, j), value);
              if (needs.masked) value = keep(mask_from(group.observed, j), value);
              return value;
            };
            store_group(gradient, begin, count, stream, out);
          });
        }
      });
}

// A vector of the constants of a tile.
struct FactorsOfVector {
  Floats weight, positive;
  bool has_weight, has_positive;

  // kFlipped: there are positives.
  template <bool kFlipped>
  MLLOSS_VECTOR Floats times(Mask hard, Floats value) const {
    if (kFlipped && has_positive) value = select(hard, multiply(positive, value), value);
    // Selected: what has no weight may be infinite.
    if (has_weight) value = select(is_zero(weight), all(0), multiply(weight, value));
    return value;
  }
};

MLLOSS_VECTOR FactorsOfVector factors_at(const Factors& factors, int i) {
  const bool has_weight = factors.weight != nullptr, has_positive = factors.positive != nullptr;
  return {has_weight ? load(factors.weight + i) : all(1),
          has_positive ? load(factors.positive + i) : all(1), has_weight, has_positive};
}

// The sum of softplus(z) times constants of the elements, for hard targets.
template <class Stored>
MLLOSS_VECTOR double weighted_softplus_sum_of(const Tile<float>& tile, const Factors& factors) {
  Floats sum[kVectors];
  for (int j = 0; j < kVectors; ++j) sum[j] = all(0);
  for_groups<false, true, Stored>(
      tile, [&](const Group<Stored>& group, int begin, int) MLLOSS_VECTOR_LAMBDA {
        if (group.observed == 0) return;
        with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
          Floats x[kVectors], e[kVectors];
          for (int j = 0; j < kVectors; ++j) {
            x[j] = load(group.logits + j * kWidth);
            if (needs.flipped) x[j] = flip_sign(mask_from(group.hard, j), x[j]);
            e[j] = x[j];
          }
          exponentials_of_size(e);
          for (int j = 0; j < kVectors; ++j) {
            Floats value = add(maximum(all(0), x[j]), log1p_below_one(e[j]));
            const FactorsOfVector own = factors_at(factors, begin + j * kWidth);
            value = own.template times<needs.flipped>(mask_from(group.hard, j), value);
            if (needs.masked) value = keep(mask_from(group.observed, j), value);
            sum[j] = add(sum[j], value);
          }
        });
      });
  return sum_of(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

template <class Stored>
MLLOSS_VECTOR void weighted_softplus_gradients_of(const Tile<float>& tile, const Factors& factors,
                                                  float scale, bool stream, void* gradients) {
  auto* out = static_cast<Stored*>(gradients);
  stream = stream && is_aligned(out);
  scale = quiet_scale(scale);
  for_groups<false, true, Stored>(
      tile, [&](const Group<Stored>& group, int begin, int count) MLLOSS_VECTOR_LAMBDA {
        with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
          const auto gradient = [&](int j) MLLOSS_VECTOR_LAMBDA {
            const Mask hard = mask_from(group.hard, j);
            Floats x = load(group.logits + j * kWidth);
            if (needs.flipped) x = flip_sign(hard, x);
            Floats value = scaled_sigmoid(x, all(scale));
            if (needs.flipped) value = flip_sign(hard, value);
            const FactorsOfVector own = factors_at(factors, begin + j * kWidth);
            value = own.template times<needs.flipped>(hard, value);
            return needs.masked ? keep(mask_from(group.observed, j), value) : value;
          };
          store_group(gradient, begin, count, stream, out);
        });
      });
}

// ---- Focal and asymmetric loss ----

// value where the bit is 1, and 1 where it is 0.
MLLOSS_VECTOR Floats one_or(float bit, Floats value) {
  return multiply_add(all(bit), value, all(1 - bit));
}

// base^power, as in math/power.h.
MLLOSS_VECTOR Floats power_of(const WholePower& power, Floats base) {
  const Floats square = multiply(base, base);
  return multiply(multiply(one_or(power.ones, base), one_or(power.twos, square)),
                  one_or(power.fours, multiply(square, square)));
}

// What losses of this kind are made of, of logits x.
struct Sigmoid {
  Floats p, q;       // sigmoid(x), sigmoid(-x)
  Floats logarithm;  // log(1 + e^-|x|)

  MLLOSS_VECTOR explicit Sigmoid(Floats x) {
    const Floats e = exponential(minus_absolute(x));
    const Floats large = divide(all(1), add(all(1), e)), small = multiply(e, large);
    p = select(is_negative(x), small, large);
    q = select(is_negative(x), large, small);
    logarithm = log1p_below_one(e);
  }
};

// The loss of a vector, and its derivative by x.
struct FocalLoss {
  FocalConstants loss;

  MLLOSS_VECTOR bool is_zero_for([[maybe_unused]] const Floats (&x)[kVectors]) const {
    return false;
  }

  template <bool kFlipped>
  MLLOSS_VECTOR Floats factor(Mask hard) const {
    const Floats negative = all(loss.negative_factor);
    return kFlipped ? select(hard, all(loss.positive_factor), negative) : negative;
  }

  template <bool kFlipped>
  MLLOSS_VECTOR Floats value(Floats x, Mask hard) const {
    const Floats z = kFlipped ? flip_sign(hard, x) : x;
    const Sigmoid sigmoid(z);
    const Floats weight = multiply(factor<kFlipped>(hard), power_of(loss.power, sigmoid.p));
    const Floats product = multiply(weight, add(maximum(all(0), z), sigmoid.logarithm));
    return select(is_zero(weight), all(0), product);
  }

  template <bool kFlipped>
  MLLOSS_VECTOR Floats derivative(Floats x, Mask hard) const {
    const Floats z = kFlipped ? flip_sign(hard, x) : x;
    const Sigmoid sigmoid(z);
    const Floats weight = multiply(factor<kFlipped>(hard), power_of(loss.power, sigmoid.p));
    const Floats softplus = add(maximum(all(0), z), sigmoid.logarithm);
    // q softplus(z) -> 0 where softplus(z) is infinite.
    const Floats product = multiply(multiply(all(loss.gamma), sigmoid.q), softplus);
    const Floats tail = select(is_zero(sigmoid.q), all(0), product);
    const Floats slope = multiply(weight, add(sigmoid.p, tail));
    return kFlipped ? flip_sign(hard, slope) : slope;
  }
};

struct AsymmetricLoss {
  AsymmetricConstants loss;

  // Negatives with p <= clip cost nothing: many, as training goes on.
  MLLOSS_VECTOR bool is_zero_for(const Floats (&x)[kVectors]) const {
    const Floats logit = all(loss.logit_high);
    bool any = false;  // NaN is no such negative
    for (int j = 0; j < kVectors; ++j) any |= any_not_less(x[j], logit);
    return !any;
  }

  struct Negative {
    Floats pm;         // max(p - clip, 0)
    Floats logarithm;  // -log(1 - pm)
  };
  MLLOSS_VECTOR Negative negative_of(Floats x, const Sigmoid& sigmoid) const {
    const Floats d = subtract(subtract(x, all(loss.logit_high)), all(loss.logit_low));
    // 1 - e^-d for d > 0
    const Floats rise = negate(expm1_of(negate(maximum(all(0), d))));
    const Floats pm = multiply(sigmoid.p, multiply(all(loss.rest), rise));
    const Floats ratio = divide(pm, add(sigmoid.q, all(loss.clip)));
    const Floats rising = add(maximum(all(0), x), sigmoid.logarithm);
    const Mask is_huge = is_negative(subtract(all(1e30f), ratio));
    return {pm, select(is_huge, rising, log1p_of(ratio))};
  }

  template <bool kFlipped>
  MLLOSS_VECTOR Floats value(Floats x, Mask hard) const {
    const Sigmoid sigmoid(x);
    const Negative negative = negative_of(x, sigmoid);
    const Floats value = multiply(power_of(loss.negative_power, negative.pm), negative.logarithm);
    if (!kFlipped) return value;
    const Floats falling = add(maximum(all(0), negate(x)), sigmoid.logarithm);
    return select(hard, multiply(power_of(loss.positive_power, sigmoid.q), falling), value);
  }

  template <bool kFlipped>
  MLLOSS_VECTOR Floats derivative(Floats x, Mask hard) const {
    const Sigmoid sigmoid(x);
    const Negative negative = negative_of(x, sigmoid);
    const Floats per_probability = divide(negative.logarithm, negative.pm);
    const Floats product = multiply(
        multiply(multiply(all(loss.negative_slope), per_probability), sigmoid.p), sigmoid.q);
    const Floats tail = select(is_zero(sigmoid.q), all(0), product);
    // q / (1 - pm), which is 1 without clip, also where q is 0.
    constexpr float kTiny = 1.17549435e-38f;
    const Floats share = divide(add(sigmoid.q, all(kTiny)), add(sigmoid.q, all(loss.clip + kTiny)));
    const Floats slope =
        multiply(power_of(loss.negative_power, negative.pm), multiply_add(sigmoid.p, share, tail));
    const Floats on_negative = select(is_zero(negative.pm), all(0), slope);
    if (!kFlipped) return on_negative;
    const Floats falling = add(maximum(all(0), negate(x)), sigmoid.logarithm);
    // p softplus(-x) -> 0 where softplus(-x) is infinite.
    const Floats positive_product =
        multiply(multiply(all(loss.positive_slope), sigmoid.p), falling);
    const Floats positive_tail = select(is_zero(sigmoid.p), all(0), positive_product);
    const Floats on_positive =
        multiply(power_of(loss.positive_power, sigmoid.q), add(sigmoid.q, positive_tail));
    return select(hard, negate(on_positive), on_negative);
  }
};

// The sum of a loss over a tile, for hard targets.
template <class Stored, class Loss>
MLLOSS_VECTOR double sum_over_tile(const Tile<float>& tile, const float* weight, const Loss& loss) {
  Floats sum[kVectors];
  for (int j = 0; j < kVectors; ++j) sum[j] = all(0);
  for_groups<false, true, Stored>(
      tile, [&](const Group<Stored>& group, int begin, int) MLLOSS_VECTOR_LAMBDA {
        if (group.observed == 0) return;
        Floats x[kVectors];
        for (int j = 0; j < kVectors; ++j) x[j] = load(group.logits + j * kWidth);
        if (group.hard == 0 && weight == nullptr && loss.is_zero_for(x)) return;
        with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
          for (int j = 0; j < kVectors; ++j) {
            const Mask hard = mask_from(group.hard, j);
            Floats value = loss.template value<needs.flipped>(x[j], hard);
            const FactorsOfVector own = factors_at({weight, nullptr}, begin + j * kWidth);
            value = own.template times<false>(hard, value);
            if (needs.masked) value = keep(mask_from(group.observed, j), value);
            sum[j] = add(sum[j], value);
          }
        });
      });
  return sum_of(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

template <class Stored, class Loss>
MLLOSS_VECTOR void gradients_over_tile(const Tile<float>& tile, const float* weight,
                                       const Loss& loss, float scale, bool stream,
                                       void* gradients) {
  auto* out = static_cast<Stored*>(gradients);
  stream = stream && is_aligned(out);
  scale = quiet_scale(scale);
  for_groups<false, true, Stored>(tile, [&](const Group<Stored>& group, int begin,
                                            int count) MLLOSS_VECTOR_LAMBDA {
    Floats x[kVectors];
    for (int j = 0; j < kVectors; ++j) x[j] = load(group.logits + j * kWidth);
    if (group.hard == 0 && weight == nullptr && scale == scale && loss.is_zero_for(x)) {
      const auto nothing = [&](int) MLLOSS_VECTOR_LAMBDA { return all(0); };
      store_group(nothing, begin, count, stream, out);
      return;
    }
    with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
      const auto gradient = [&](int j) MLLOSS_VECTOR_LAMBDA {
        const Mask hard = mask_from(group.hard, j);
        Floats value = multiply(all(scale), loss.template derivative<needs.flipped>(x[j], hard));
        const FactorsOfVector own = factors_at({weight, nullptr}, begin + j * kWidth);
        value = own.template times<false>(hard, value);
        return needs.masked ? keep(mask_from(group.observed, j), value) : value;
      };
      store_group(gradient, begin, count, stream, out);
    });
  });
}

// ---- Sums of exponentials ----

constexpr float kNothing = -kInfinity<float>;  // as a value: its exponential is 0

// One side of a tile: its largest value, and its sum relative to what the sum before is relative
// to.
struct SideLanes {
  Floats shift;
  Floats sum[kVectors], largest[kVectors];

  MLLOSS_VECTOR explicit SideLanes(const RunningSum& before) : shift(all(before.shift)) {
    for (int j = 0; j < kVectors; ++j) {
      sum[j] = all(0);
      largest[j] = all(kNothing);
    }
  }

  MLLOSS_VECTOR float largest_value() const {
    return maximum_of(maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3])));
  }
  MLLOSS_VECTOR double total() const {
    return sum_of(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  }
};

// kSums: adds up exponentials; otherwise only looks for the largest values.
template <bool kSums, class Stored>
MLLOSS_VECTOR void add_sides(const Tile<float>& tile, SideLanes& negative, SideLanes& positive) {
  for_groups<false, kSums, Stored>(
      tile, [&](const Group<Stored>& group, int, int) MLLOSS_VECTOR_LAMBDA {
        if (group.observed == 0) return;
        with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
          for (int j = 0; j < kVectors; ++j) {
            Floats value = load(group.logits + j * kWidth);
            const Mask hard = mask_from(group.hard, j);
            if (needs.flipped) value = flip_sign(hard, value);
            if (needs.masked) value = select(mask_from(group.observed, j), value, all(kNothing));
            if (!needs.flipped) {
              negative.largest[j] = maximum(value, negative.largest[j]);
              if (kSums) {
                const Floats e = exponential(subtract(value, negative.shift));
                negative.sum[j] = add(negative.sum[j], e);
              }
            } else {
              const Floats rest = select(hard, all(kNothing), value);
              const Floats own = select(hard, value, all(kNothing));
              negative.largest[j] = maximum(rest, negative.largest[j]);
              positive.largest[j] = maximum(own, positive.largest[j]);
              if (kSums) {
                const Floats shift = select(hard, positive.shift, negative.shift);
                const Floats e = exponential(subtract(value, shift));
                negative.sum[j] = add(negative.sum[j], select(hard, all(0), e));
                positive.sum[j] = add(positive.sum[j], keep(hard, e));
              }
            }
          }
        });
      });
}

// Adds a tile to both sums, unless a value lies too far above what its side is relative to.
template <class Stored>
MLLOSS_VECTOR bool add_near(const Tile<float>& tile, RunningSums* sums) {
  SideLanes negative(sums->negative), positive(sums->positive);
  add_sides<true, Stored>(tile, negative, positive);
  const float largest_negative = negative.largest_value();
  const float largest_positive = positive.largest_value();
  if (!sums->negative.is_near(largest_negative) || !sums->positive.is_near(largest_positive)) {
    return false;
  }
  sums->negative.add(largest_negative, negative.total());
  sums->positive.add(largest_positive, positive.total());
  return true;
}

// See sums_of_tile in rowwise.h. But for the first tile of a row, this takes one pass.
template <class Stored>
MLLOSS_VECTOR bool exponential_sums_of(const Tile<float>& tile, RunningSums* sums) {
  if (!sums->negative.is_empty() && add_near<Stored>(tile, sums)) return true;
  // The largest values first; the tile stays in the L1 cache.
  SideLanes negative(sums->negative), positive(sums->positive);
  add_sides<false, Stored>(tile, negative, positive);
  const float largest_negative = negative.largest_value();
  const float largest_positive = positive.largest_value();
  if (largest_negative == kInfinity<float> || largest_positive == kInfinity<float>) return false;
  sums->negative.raise(largest_negative);
  sums->positive.raise(largest_positive);
  return add_near<Stored>(tile, sums);
}

// See gradients_of_tile in rowwise.h.
template <class Stored>
MLLOSS_VECTOR void exponential_gradients_of(const Tile<float>& tile,
                                            const RowStatistics<float>& statistics, float scale,
                                            bool stream, void* gradients) {
  auto* out = static_cast<Stored*>(gradients);
  stream = stream && is_aligned(out);
  const float positive_factor = quiet_scale(-scale * statistics.positive_factor);
  const float negative_factor = quiet_scale(scale * statistics.negative_factor);
  const Floats shift = all(statistics.negative_shift);
  for_groups<false, true, Stored>(
      tile, [&](const Group<Stored>& group, int begin, int count) MLLOSS_VECTOR_LAMBDA {
        with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
          const auto gradient = [&](int j) MLLOSS_VECTOR_LAMBDA {
            Floats x = load(group.logits + j * kWidth), own = shift;
            Floats factor = all(negative_factor);
            if (needs.flipped) {
              const Mask hard = mask_from(group.hard, j);
              x = flip_sign(hard, x);
              own = select(hard, all(statistics.positive_shift), own);
              factor = select(hard, all(positive_factor), factor);
            }
            const Floats value = multiply(factor, exponential(subtract(x, own)));
            return needs.masked ? keep(mask_from(group.observed, j), value) : value;
          };
          store_group(gradient, begin, count, stream, out);
        });
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

__attribute__((MLLOSS_TARGET)) double weighted_softplus_sum(const Tile<float>& tile,
                                                            const Factors& factors) {
  double sum = 0;
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    sum = weighted_softplus_sum_of<decltype(stored)>(tile, factors);
  });
  return sum;
}

__attribute__((MLLOSS_TARGET)) void weighted_softplus_gradients(const Tile<float>& tile,
                                                                const Factors& factors, float scale,
                                                                bool stream, void* gradients) {
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    weighted_softplus_gradients_of<decltype(stored)>(tile, factors, scale, stream, gradients);
  });
}

// sum and gradients of a loss, by the name of its functions.
#define MLLOSS_VECTOR_LOSS(name, Loss, Constants)                                                \
  __attribute__((MLLOSS_TARGET)) double name##_sum(const Tile<float>& tile, const float* weight, \
                                                   const Constants& constants) {                 \
    double sum = 0;                                                                              \
    dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {                                       \
      sum = sum_over_tile<decltype(stored)>(tile, weight, Loss{constants});                      \
    });                                                                                          \
    return sum;                                                                                  \
  }                                                                                              \
  __attribute__((MLLOSS_TARGET)) void name##_gradients(                                          \
      const Tile<float>& tile, const float* weight, const Constants& constants, float scale,     \
      bool stream, void* gradients) {                                                            \
    dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {                                       \
      gradients_over_tile<decltype(stored)>(tile, weight, Loss{constants}, scale, stream,        \
                                            gradients);                                          \
    });                                                                                          \
  }
MLLOSS_VECTOR_LOSS(focal, FocalLoss, FocalConstants)
MLLOSS_VECTOR_LOSS(asymmetric, AsymmetricLoss, AsymmetricConstants)
#undef MLLOSS_VECTOR_LOSS

__attribute__((MLLOSS_TARGET)) bool exponential_sums(const Tile<float>& tile, RunningSums* sums) {
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

constexpr VectorKernels kKernels = {
    softplus_sum,     softplus_gradients,    weighted_softplus_sum, weighted_softplus_gradients,
    focal_sum,        focal_gradients,       asymmetric_sum,        asymmetric_gradients,
    exponential_sums, exponential_gradients, count_observed,        fence,
};

#undef MLLOSS_VECTOR_LAMBDA
