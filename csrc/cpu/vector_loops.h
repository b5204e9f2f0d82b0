// The loops of VectorKernels over the vectors of one instruction set; included by
// vector_kernels.cpp once for each.
constexpr int kGroup = kVectors * kWidth;
constexpr uint64_t kFull = kGroup == 64 ? ~uint64_t(0) : (uint64_t(1) << (kGroup % 64)) - 1;

using GroupBits = std::conditional_t<kGroup == 64, uint64_t, uint32_t>;

// The hard targets or the mask of a tile, as the bits of its groups.
class TileBits {
 public:
  // Of bytes or words, or of neither: then all bits are `others`.
  MLLOSS_VECTOR TileBits(const uint8_t* bytes, const uint32_t* words, GroupBits others, int count)
      : bytes_(bytes), words_(words), others_(others) {
    const int whole = count / kGroup, rest = count % kGroup;
    if (rest == 0) return;
    if (bytes != nullptr) {
      last_ = bits_of(bytes + whole * kGroup, rest);
    } else if (words != nullptr) {
      words += whole * (kGroup / kWordBits);
      last_ = words[0];
      if (rest > kWordBits) last_ |= uint64_t(words[1]) << kWordBits;
    } else {
      last_ = others;
    }
    last_ &= (uint64_t(1) << rest) - 1;
  }

  // Of a whole group. Bytes become bits here rather than for the tile at once: with arithmetic in
  // between, memory keeps up.
  MLLOSS_VECTOR uint64_t of_group(int group) const {
    if (bytes_ != nullptr) return bits_of(bytes_ + group * kGroup, kGroup);
    if (words_ == nullptr) return others_;
    GroupBits own;
    std::memcpy(&own, words_ + group * (kGroup / kWordBits), sizeof own);
    return own;
  }
  // Of what is no whole group, of which there may be none.
  MLLOSS_VECTOR uint64_t of_rest() const { return last_; }

 private:
  const uint8_t* bytes_;
  const uint32_t* words_;
  GroupBits others_;
  uint64_t last_ = 0;
};

// Two vectors of elements, one behind the other (bf16 has an overload of its own: the even, then
// the odd ones).
template <class Stored>
MLLOSS_VECTOR void load_pair(const Stored* data, Floats& a, Floats& b) {
  a = load(data);
  b = load(data + kWidth);
}

// Bits of a group in the order of load_pair.
template <class Stored>
MLLOSS_VECTOR uint64_t in_order(uint64_t bits) {
  constexpr bool kPairs = std::is_same_v<Stored, BFloat16>;
  return kPairs && bits != 0 && bits != kFull ? in_pairs(bits) : bits;
}

// Elements of a tile, kGroup of them or, at its end, a copy filled up with zeros that are not
// observed. The bits are in the order of load_pair.
template <class Stored>
struct Group {
  const Stored* logits = nullptr;
  const float* soft = nullptr;
  uint64_t hard = 0;
  uint64_t observed = kFull;
  int begin = 0;
  int count = 0;
};

template <class Stored>
MLLOSS_VECTOR void load_group(const Stored* data, Floats (&x)[kVectors]) {
  for (int j = 0; j < kVectors; j += 2) load_pair(data + j * kWidth, x[j], x[j + 1]);
}

// Floats beside elements of type Stored, in the same order.
template <class Stored>
MLLOSS_VECTOR void load_beside(const float* data, Floats (&x)[kVectors]) {
  for (int j = 0; j < kVectors; j += 2) {
    if constexpr (std::is_same_v<Stored, BFloat16>) {
      load_in_pairs(data + j * kWidth, x[j], x[j + 1]);
    } else {
      load_pair(data + j * kWidth, x[j], x[j + 1]);
    }
  }
}

// For groups that are taken in one step.
struct NoState {
  static constexpr bool kOverlaps = false;
};

// Calls start(group, state), then finish(group, state), for the groups of a tile, and in their
// place leave_out(group) for groups of which nothing is observed. If a State overlaps, a group
// starts before the one before it is finished. kSoft: with soft targets. Also fetches ahead what
// memory holds behind the tile.
template <bool kSoft, class Stored, class State, class LeaveOut, class Start, class Finish>
MLLOSS_VECTOR void for_groups(const Tile<float>& tile, const LeaveOut& leave_out,
                              const Start& start, const Finish& finish) {
  const LabelTile<float>& labels = tile.labels;
  const bool is_hard = labels.kind == TargetKind::kHard;
  const TileBits hard(is_hard ? labels.hard : nullptr, is_hard ? labels.hard_bits : nullptr, 0,
                      tile.count);
  const TileBits observed(labels.observed, labels.observed_bits, static_cast<GroupBits>(kFull),
                          tile.count);
  // Whole groups first, then what is none, as a copy filled up: two rounds of one loop, since its
  // body is large.
  const int groups = tile.count / kGroup, rest = tile.count % kGroup;
  alignas(64) Stored last_logits[kGroup];
  alignas(64) float last_soft[kGroup];
  const auto* tile_logits = static_cast<const Stored*>(tile.stored);
  if (rest > 0) {
    copy_padded(tile_logits + groups * kGroup, rest * sizeof(Stored), sizeof last_logits,
                last_logits);
    if (kSoft) {
      copy_padded(labels.soft + groups * kGroup, rest * sizeof(float), sizeof last_soft, last_soft);
    }
  }
  Group<Stored> before;
  State state_before;
  bool has_before = false;
  for (const bool is_last : {false, true}) {
    const Stored* logits = is_last ? last_logits : tile_logits;
    const float* soft = is_last ? last_soft : labels.soft;
    const int begin = is_last ? groups * kGroup : 0;
    const int count = is_last ? rest : kGroup;
    const int end = is_last ? rest > 0 : groups;
    for (int g = 0; g < end; ++g) {
      const char* fetched = reinterpret_cast<const char*>(logits + g * kGroup) + kPrefetch;
      for (int line = 0; line < kGroup * int(sizeof(Stored)); line += 64) {
        _mm_prefetch(fetched + line, _MM_HINT_T0);
      }
      // Bytes as many elements ahead, and not all of a tile at once; prefetching never faults.
      constexpr int kAhead = kPrefetch / int(sizeof(Stored));
      if (labels.hard != nullptr) __builtin_prefetch(labels.hard + begin + g * kGroup + kAhead);
      if (labels.observed != nullptr) {
        __builtin_prefetch(labels.observed + begin + g * kGroup + kAhead);
      }
      const Group<Stored> group{
          logits + g * kGroup,
          kSoft ? soft + g * kGroup : nullptr,
          in_order<Stored>(is_last ? hard.of_rest() : hard.of_group(g)),
          in_order<Stored>(is_last ? observed.of_rest() : observed.of_group(g)),
          begin + g * kGroup,
          count};
      if (group.observed == 0) {  // common where few labels are observed
        leave_out(group);
        continue;
      }
      State state;
      start(group, state);
      if constexpr (State::kOverlaps) {
        if (has_before) finish(before, state_before);
        has_before = true;
        before = group;
        state_before = state;
      } else {
        finish(group, state);
      }
    }
  }
  if (has_before) finish(before, state_before);
}

// Calls body(group), or leave_out(group), for the groups of a tile.
template <bool kSoft, class Stored, class LeaveOut, class Body>
MLLOSS_VECTOR void for_groups(const Tile<float>& tile, const LeaveOut& leave_out,
                              const Body& body) {
  for_groups<kSoft, Stored, NoState>(
      tile, leave_out, [](const Group<Stored>&, NoState) MLLOSS_VECTOR_LAMBDA {},
      [&](const Group<Stored>& group, NoState) MLLOSS_VECTOR_LAMBDA { body(group); });
}

// What is left out of sums.
struct Nothing {
  template <class Group>
  MLLOSS_VECTOR void operator()(const Group&) const {}
};

// Writes a group of gradients.
template <class Stored>
MLLOSS_VECTOR void store_group(const Floats (&values)[kVectors], int begin, int count, bool stream,
                               Stored* gradients) {
  const bool is_whole = count == kGroup;
  alignas(64) Stored last[kGroup];
  Stored* out = is_whole ? gradients + begin : last;
  for (int j = 0; j < kVectors; j += 2) {
    store_pair(values[j], values[j + 1], stream && is_whole, out + j * kWidth);
  }
  if (!is_whole) std::memcpy(gradients + begin, last, count * sizeof(Stored));
}

// The gradients of what is left out.
template <class Stored>
struct Zeros {
  bool stream;
  Stored* gradients;

  MLLOSS_VECTOR void operator()(const Group<Stored>& group) const {
    Floats zeros[kVectors];
    MLLOSS_FOR_VECTORS (j) zeros[j] = all(0);
    store_group(zeros, group.begin, group.count, stream, gradients);
  }
};

// NaN that is safe to be rounded to bf16: a product takes over the bits of one that it meets.
MLLOSS_VECTOR float quiet_scale(float scale) { return scale != scale ? kNaN<float> : scale; }

// Streaming takes aligned addresses only.
MLLOSS_VECTOR bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 64 == 0;
}

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

// log(u + lost): as log_of_sum in math/scalar.h.
MLLOSS_VECTOR Floats log_of(Floats u, Floats lost) {
  const Parts parts = parts_of(u);
  const Floats f = multiply_add(lost, parts.inverse_power, subtract(parts.rest, all(1)));
  Floats p = all(kLogarithm[0]);
  for (int i = 1; i < 9; ++i) p = multiply_add(p, f, all(kLogarithm[i]));
  const Floats square = multiply(f, f);
  Floats y = multiply_add(parts.exponent, all(-2.12194440e-4f), multiply(multiply(p, f), square));
  y = multiply_add(all(-0.5f), square, y);
  return multiply_add(parts.exponent, all(0.693359375f), add(f, y));
}

// log(1 + q), q >= 0: as log1p_nonnegative in math/scalar.h.
MLLOSS_VECTOR Floats log1p_of(Floats q) {
  const Floats u = add(all(1), q);
  // What rounding dropped. NaN goes its way through here.
  return log_of(u, select(is_negative(subtract(q, all(1))), subtract(q, subtract(u, all(1))),
                          subtract(all(1), subtract(u, q))));
}

// log(1 + e) for 0 <= e <= 1.
MLLOSS_VECTOR Floats log1p_below_one(Floats e) {
  Floats p = all(kLog1p[0]);
  for (int i = 1; i < 9; ++i) p = multiply_add(p, e, all(kLog1p[i]));
  return multiply(p, e);
}

// What losses of probabilities are made of, of logits x.
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

// A lane sees at most kTile / kGroup elements of a tile, so its q < 2^(kTile / kGroup): two lanes
// fit together where that stays below what a float holds.
constexpr int kProducts = 2 * (kTile / kGroup) < 100 ? kVectors / 2 : kVectors;
static_assert(kProducts * kWidth == LossSum::kProducts && kWidth <= LossSum::kLinear);

MLLOSS_VECTOR void take_logarithms(LossSum* sum) {
  for (int tile = 0; tile < sum->tiles; ++tile) {
    Floats part = load(sum->linear[tile]);
    for (int j = 0; j < kProducts; ++j) {
      part = add(part, log1p_of(load(sum->products[tile] + j * kWidth)));
    }
    sum->total += sum_of(part);
  }
  sum->tiles = 0;
}

// See add_to_lanes in pointwise.h.
struct SoftplusLanes {
  Floats q[kVectors], linear[kVectors];

  MLLOSS_VECTOR SoftplusLanes() {
    MLLOSS_FOR_VECTORS (j) q[j] = linear[j] = all(0);
  }

  MLLOSS_VECTOR void multiply_by(const Floats (&e)[kVectors]) {
    MLLOSS_FOR_VECTORS (j) q[j] = multiply_add(q[j], e[j], add(q[j], e[j]));
  }

  MLLOSS_VECTOR void add_to(LossSum* sum) const {
    float* products = sum->products[sum->tiles];
    for (int j = 0; j < kProducts; ++j) {
      Floats product = q[j];
      if constexpr (kProducts < kVectors) {
        const Floats other = q[j + kProducts];
        product = multiply_add(product, other, add(product, other));
      }
      store(product, products + j * kWidth);
    }
    store(add(add(linear[0], linear[1]), add(linear[2], linear[3])), sum->linear[sum->tiles]);
    if (++sum->tiles == LossSum::kTiles) take_logarithms(sum);
  }
};

template <class Stored>
MLLOSS_VECTOR void soft_softplus_sum_of(const Tile<float>& tile, LossSum* sum) {
  SoftplusLanes lanes;
  for_groups<true, Stored>(tile, Nothing{}, [&](const Group<Stored>& group) MLLOSS_VECTOR_LAMBDA {
    Floats x[kVectors], y[kVectors], e[kVectors];
    load_group(group.logits, x);
    load_beside<Stored>(group.soft, y);
    MLLOSS_FOR_VECTORS (j) {
      const Mask observed = mask_from(group.observed, j);
      const Floats factor = subtract(select(is_negative(x[j]), all(0), all(1)), y[j]);
      // Selected: an infinite logit on its right side costs 0.
      const Floats part = select(is_zero(factor), all(0), multiply(factor, x[j]));
      lanes.linear[j] = add(lanes.linear[j], keep(observed, part));
      // NaN has to stay: beside it, the linear part may be 0.
      e[j] = keep(observed, exponential(minus_absolute(x[j])));
    }
    lanes.multiply_by(e);
  });
  lanes.add_to(sum);
}

template <class Stored>
MLLOSS_VECTOR void softplus_sum_of(const Tile<float>& tile, LossSum* sum) {
  SoftplusLanes lanes;
  for_groups<false, Stored, Exponentials>(
      tile, Nothing{},
      [&](const Group<Stored>& group, Exponentials& exponentials) MLLOSS_VECTOR_LAMBDA {
        Floats x[kVectors];
        load_group(group.logits, x);
        with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
          MLLOSS_FOR_VECTORS (j) {
            if (needs.flipped) x[j] = flip_sign(mask_from(group.hard, j), x[j]);
            // A negative at -inf costs nothing.
            if (needs.masked) {
              x[j] = select(mask_from(group.observed, j), x[j], all(-kInfinity<float>));
            }
          }
        });
        MLLOSS_FOR_VECTORS (j) {
          lanes.linear[j] = add(lanes.linear[j], maximum(all(0), x[j]));
        }
        exponentials.start_of_size(x);
      },
      [&](const Group<Stored>&, const Exponentials& exponentials) MLLOSS_VECTOR_LAMBDA {
        Floats e[kVectors];
        exponentials.finish(e);
        lanes.multiply_by(e);
      });
  lanes.add_to(sum);
}

// Of what a group needs: flips the sign of positive gradients back, and 0 where masked.
template <class Stored>
MLLOSS_VECTOR void finish_gradients(const Group<Stored>& group, Floats (&values)[kVectors]) {
  with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
    MLLOSS_FOR_VECTORS (j) {
      if (needs.flipped) values[j] = flip_sign(mask_from(group.hard, j), values[j]);
      if (needs.masked) values[j] = keep(mask_from(group.observed, j), values[j]);
    }
  });
}

// The gradient of softplus(z) without weights.
template <class Stored>
MLLOSS_VECTOR void soft_softplus_gradients_of(const Tile<float>& tile, float scale, bool stream,
                                              Stored* out) {
  stream = stream && is_aligned(out);
  scale = quiet_scale(scale);
  for_groups<true, Stored>(
      tile, Zeros<Stored>{stream, out}, [&](const Group<Stored>& group) MLLOSS_VECTOR_LAMBDA {
        // (1 - y) sigmoid(x) - y sigmoid(-x)
        Floats x[kVectors], y[kVectors];
        load_group(group.logits, x);
        load_beside<Stored>(group.soft, y);
        MLLOSS_FOR_VECTORS (j) {
          const Sigmoid sigmoid(x[j]);
          const Floats value =
              subtract(multiply(subtract(all(1), y[j]), sigmoid.p), multiply(y[j], sigmoid.q));
          x[j] = keep(mask_from(group.observed, j), multiply(all(scale), value));
        }
        store_group(x, group.begin, group.count, stream, out);
      });
}

template <class Stored>
MLLOSS_VECTOR void softplus_gradients_of(const Tile<float>& tile, float scale, bool stream,
                                         Stored* out) {
  stream = stream && is_aligned(out);
  scale = quiet_scale(scale);
  for_groups<false, Stored, Exponentials>(
      tile, Zeros<Stored>{stream, out},
      [&](const Group<Stored>& group, Exponentials& exponentials) MLLOSS_VECTOR_LAMBDA {
        Floats x[kVectors];
        load_group(group.logits, x);
        // The sign of positives is flipped, and flipped back.
        if (group.hard != 0) {
          MLLOSS_FOR_VECTORS (j) x[j] = flip_sign(mask_from(group.hard, j), x[j]);
        }
        exponentials.start_sigmoids(x);
      },
      [&](const Group<Stored>& group, const Exponentials& exponentials) MLLOSS_VECTOR_LAMBDA {
        Floats values[kVectors];
        exponentials.finish_sigmoids(all(scale), values);
        finish_gradients(group, values);
        store_group(values, group.begin, group.count, stream, out);
      });
}

// The constants of a group.
struct FactorsOfGroup {
  Floats weight[kVectors], positive[kVectors];
  bool has_weight, has_positive;

  // kFlipped: there are positives.
  template <bool kFlipped>
  MLLOSS_VECTOR Floats times(int j, Mask hard, Floats value) const {
    if (kFlipped && has_positive) value = select(hard, multiply(positive[j], value), value);
    // Selected: what has no weight may be infinite.
    if (has_weight) value = select(is_zero(weight[j]), all(0), multiply(weight[j], value));
    return value;
  }
};

template <class Stored>
MLLOSS_VECTOR FactorsOfGroup factors_of(const Factors& factors, const Group<Stored>& group) {
  FactorsOfGroup own;
  own.has_weight = factors.weight != nullptr;
  own.has_positive = factors.positive != nullptr && group.hard != 0;
  if (own.has_weight) load_beside<Stored>(factors.weight + group.begin, own.weight);
  if (own.has_positive) load_beside<Stored>(factors.positive + group.begin, own.positive);
  return own;
}

// The sum of softplus(z) times constants of the elements, for hard targets.
template <class Stored>
MLLOSS_VECTOR void weighted_softplus_sum_of(const Tile<float>& tile, const Factors& factors,
                                            LossSum* loss_sum) {
  Floats sum[kVectors];
  MLLOSS_FOR_VECTORS (j) sum[j] = all(0);
  for_groups<false, Stored>(tile, Nothing{}, [&](const Group<Stored>& group) MLLOSS_VECTOR_LAMBDA {
    const FactorsOfGroup own = factors_of(factors, group);
    with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
      Floats x[kVectors], e[kVectors];
      load_group(group.logits, x);
      if (needs.flipped) {
        MLLOSS_FOR_VECTORS (j) x[j] = flip_sign(mask_from(group.hard, j), x[j]);
      }
      Exponentials exponentials;
      exponentials.start_of_size(x);
      exponentials.finish(e);
      MLLOSS_FOR_VECTORS (j) {
        Floats value = add(maximum(all(0), x[j]), log1p_below_one(e[j]));
        value = own.template times<needs.flipped>(j, mask_from(group.hard, j), value);
        if (needs.masked) value = keep(mask_from(group.observed, j), value);
        sum[j] = add(sum[j], value);
      }
    });
  });
  loss_sum->total += sum_of(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

template <class Stored>
MLLOSS_VECTOR void weighted_softplus_gradients_of(const Tile<float>& tile, const Factors& factors,
                                                  float scale, bool stream, void* gradients) {
  auto* out = static_cast<Stored*>(gradients);
  stream = stream && is_aligned(out);
  scale = quiet_scale(scale);
  for_groups<false, Stored>(tile, Zeros<Stored>{stream, out},
                            [&](const Group<Stored>& group) MLLOSS_VECTOR_LAMBDA {
                              const FactorsOfGroup own = factors_of(factors, group);
                              with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
                                Floats x[kVectors];
                                load_group(group.logits, x);
                                if (needs.flipped) {
                                  MLLOSS_FOR_VECTORS (j)
                                    x[j] = flip_sign(mask_from(group.hard, j), x[j]);
                                }
                                Exponentials exponentials;
                                exponentials.start_sigmoids(x);
                                exponentials.finish_sigmoids(all(scale), x);
                                MLLOSS_FOR_VECTORS (j) {
                                  const Mask hard = mask_from(group.hard, j);
                                  if (needs.flipped) x[j] = flip_sign(hard, x[j]);
                                  x[j] = own.template times<needs.flipped>(j, hard, x[j]);
                                  if (needs.masked) x[j] = keep(mask_from(group.observed, j), x[j]);
                                }
                                store_group(x, group.begin, group.count, stream, out);
                              });
                            });
}

// ---- Focal, asymmetric and probability losses ----

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
    MLLOSS_FOR_VECTORS (j) any |= any_greater_or_nan(x[j], logit);
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

// Binary cross-entropy of probabilities.
struct ProbabilityLoss {
  ProbabilityConstants loss;

  MLLOSS_VECTOR bool is_zero_for([[maybe_unused]] const Floats (&p)[kVectors]) const {
    return false;
  }

  // NaN where p is outside [0, 1]. The sum makes a 0 of -0.
  MLLOSS_VECTOR static Floats valid(Floats p, Floats rest, Floats value) {
    return select(is_negative(multiply_add(p, rest, all(0))), all(kNaN<float>), value);
  }

  // The probability of what the target is.
  template <bool kFlipped>
  MLLOSS_VECTOR static Floats side_of(Floats p, Floats rest, Mask hard) {
    return kFlipped ? select(hard, p, rest) : rest;
  }

  template <bool kFlipped>
  MLLOSS_VECTOR Floats value(Floats p, Mask hard) const {
    const Floats rest = subtract(all(1), p);
    const Floats lost_of_rest = subtract(subtract(all(1), rest), p);
    const Floats u = side_of<kFlipped>(p, rest, hard);
    // NaN goes its way through here.
    const Floats lost = kFlipped ? select(hard, multiply(p, all(0)), lost_of_rest) : lost_of_rest;
    Floats logarithm;
    if constexpr (kFlipped) {
      // Of 2^24 u where u may be subnormal; what lies above has nothing to lose by it.
      const Mask is_small = is_negative(subtract(u, all(1.17549435e-38f)));
      const Floats scaled = select(is_small, multiply(u, all(16777216.0f)), u);
      const Floats shift = select(is_small, all(16.6355323f), all(0));  // 24 ln 2
      logarithm = subtract(log_of(scaled, lost), shift);
    } else {
      logarithm = log_of(u, lost);  // a difference to 1 is 0 or not subnormal
    }
    logarithm = select(is_zero(u), all(-loss.most), logarithm);
    const Floats limited = maximum(all(-loss.most), logarithm);
    return valid(p, rest, maximum(all(loss.least), negate(limited)));
  }

  template <bool kFlipped>
  MLLOSS_VECTOR Floats derivative(Floats p, Mask hard) const {
    const Floats rest = subtract(all(1), p);
    Floats slope = divide(all(1), maximum(all(1e-12f), side_of<kFlipped>(p, rest, hard)));
    if (loss.eps > 0) {
      const Floats eps = all(loss.eps);
      slope = select(is_negative(subtract(p, eps)), all(0), slope);
      slope = select(is_negative(subtract(rest, eps)), all(0), slope);
    }
    slope = valid(p, rest, slope);
    return kFlipped ? flip_sign(hard, slope) : slope;
  }
};

// The sum of a loss over a tile, for hard targets.
template <class Stored, class Loss>
MLLOSS_VECTOR void sum_over_tile(const Tile<float>& tile, const Factors& factors, const Loss& loss,
                                 LossSum* loss_sum) {
  Floats sum[kVectors];
  MLLOSS_FOR_VECTORS (j) sum[j] = all(0);
  for_groups<false, Stored>(tile, Nothing{}, [&](const Group<Stored>& group) MLLOSS_VECTOR_LAMBDA {
    Floats x[kVectors];
    load_group(group.logits, x);
    if (group.hard == 0 && factors.weight == nullptr && loss.is_zero_for(x)) return;
    const FactorsOfGroup own = factors_of(factors, group);
    with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
      MLLOSS_FOR_VECTORS (j) {
        const Mask hard = mask_from(group.hard, j);
        Floats value = loss.template value<needs.flipped>(x[j], hard);
        value = own.template times<needs.flipped>(j, hard, value);
        if (needs.masked) value = keep(mask_from(group.observed, j), value);
        sum[j] = add(sum[j], value);
      }
    });
  });
  loss_sum->total += sum_of(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

template <class Stored, class Loss>
MLLOSS_VECTOR void gradients_over_tile(const Tile<float>& tile, const Factors& factors,
                                       const Loss& loss, float scale, bool stream,
                                       void* gradients) {
  auto* out = static_cast<Stored*>(gradients);
  stream = stream && is_aligned(out);
  scale = quiet_scale(scale);
  for_groups<false, Stored>(
      tile, Zeros<Stored>{stream, out}, [&](const Group<Stored>& group) MLLOSS_VECTOR_LAMBDA {
        Floats x[kVectors];
        load_group(group.logits, x);
        if (group.hard == 0 && factors.weight == nullptr && scale == scale && loss.is_zero_for(x)) {
          MLLOSS_FOR_VECTORS (j) x[j] = all(0);
          store_group(x, group.begin, group.count, stream, out);
          return;
        }
        const FactorsOfGroup own = factors_of(factors, group);
        with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
          MLLOSS_FOR_VECTORS (j) {
            const Mask hard = mask_from(group.hard, j);
            Floats value =
                multiply(all(scale), loss.template derivative<needs.flipped>(x[j], hard));
            value = own.template times<needs.flipped>(j, hard, value);
            x[j] = needs.masked ? keep(mask_from(group.observed, j), value) : value;
          }
          store_group(x, group.begin, group.count, stream, out);
        });
      });
}

// ---- Sums of exponentials ----

constexpr float kNothing = -kInfinity<float>;  // as a value: its exponential is 0

// One side of a tile: its largest values, and sums relative to what the sum before is relative to.
struct SideLanes {
  Floats shift;
  Floats sum[kVectors], largest[kVectors];

  MLLOSS_VECTOR explicit SideLanes(const RunningSum& before) : shift(all(before.shift)) {
    MLLOSS_FOR_VECTORS (j) {
      sum[j] = all(0);
      largest[j] = all(kNothing);
    }
  }

  static_assert(kWidth <= RunningSum::kLargest);

  MLLOSS_VECTOR Floats largest_values() const {
    return maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3]));
  }
  MLLOSS_VECTOR bool is_near() const {
    return !any_greater_or_nan(largest_values(), add(shift, all(RunningSum::kNear)));
  }
  MLLOSS_VECTOR void add_to(RunningSum* running) const {
    store(maximum(load(running->largest), largest_values()), running->largest);
    add_doubles(add(add(sum[0], sum[1]), add(sum[2], sum[3])), running->sum);
  }
};

// A group with the signs of positives flipped, and nothing in the place of what is not observed;
// also notes the largest values of each side.
template <class Stored>
MLLOSS_VECTOR void values_of(const Group<Stored>& group, Floats (&value)[kVectors],
                             SideLanes& negative, SideLanes& positive) {
  load_group(group.logits, value);
  with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
    MLLOSS_FOR_VECTORS (j) {
      const Mask hard = mask_from(group.hard, j);
      if (needs.flipped) value[j] = flip_sign(hard, value[j]);
      if (needs.masked) {
        value[j] = select(mask_from(group.observed, j), value[j], all(kNothing));
      }
      if (needs.flipped) {
        const Floats own = select(hard, value[j], all(kNothing));
        positive.largest[j] = maximum(own, positive.largest[j]);
      }
      const Floats rest = needs.flipped ? select(hard, all(kNothing), value[j]) : value[j];
      negative.largest[j] = maximum(rest, negative.largest[j]);
    }
  });
}

template <class Stored>
MLLOSS_VECTOR void find_largest(const Tile<float>& tile, SideLanes& negative, SideLanes& positive) {
  for_groups<false, Stored>(tile, Nothing{}, [&](const Group<Stored>& group) MLLOSS_VECTOR_LAMBDA {
    Floats value[kVectors];
    values_of(group, value, negative, positive);
  });
}

template <class Stored>
MLLOSS_VECTOR void add_sides(const Tile<float>& tile, SideLanes& negative, SideLanes& positive) {
  for_groups<false, Stored, Exponentials>(
      tile, Nothing{},
      [&](const Group<Stored>& group, Exponentials& exponentials) MLLOSS_VECTOR_LAMBDA {
        Floats value[kVectors];
        values_of(group, value, negative, positive);
        MLLOSS_FOR_VECTORS (j) {
          Floats shift = negative.shift;
          if (group.hard != 0) shift = select(mask_from(group.hard, j), positive.shift, shift);
          value[j] = subtract(value[j], shift);
        }
        exponentials.start(value);
      },
      [&](const Group<Stored>& group, const Exponentials& exponentials) MLLOSS_VECTOR_LAMBDA {
        Floats e[kVectors];
        exponentials.finish(e);
        if (group.hard != 0) {
          MLLOSS_FOR_VECTORS (j) {
            const Mask hard = mask_from(group.hard, j);
            positive.sum[j] = add(positive.sum[j], keep(hard, e[j]));
            e[j] = select(hard, all(0), e[j]);
          }
        }
        MLLOSS_FOR_VECTORS (j) negative.sum[j] = add(negative.sum[j], e[j]);
      });
}

// Adds a tile to both sums, unless a value lies too far above what its side is relative to.
template <class Stored>
MLLOSS_VECTOR bool add_near(const Tile<float>& tile, RunningSums* sums) {
  SideLanes negative(sums->negative), positive(sums->positive);
  add_sides<Stored>(tile, negative, positive);
  if (!negative.is_near() || !positive.is_near()) return false;
  negative.add_to(&sums->negative);
  if (tile.labels.kind == TargetKind::kHard) positive.add_to(&sums->positive);
  return true;
}

// See sums_of_tile in rowwise.h. This takes one pass, and two more where a side begins or rises
// much.
template <class Stored>
MLLOSS_VECTOR bool exponential_sums_of(const Tile<float>& tile, RunningSums* sums) {
  if (sums->negative.has_shift() && add_near<Stored>(tile, sums)) return true;
  // The largest values first; the tile stays in the L1 cache.
  SideLanes negative(sums->negative), positive(sums->positive);
  find_largest<Stored>(tile, negative, positive);
  const float largest_negative = maximum_of(negative.largest_values());
  const float largest_positive = maximum_of(positive.largest_values());
  if (largest_negative == kInfinity<float> || largest_positive == kInfinity<float>) return false;
  sums->negative.raise(largest_negative);
  sums->positive.raise(largest_positive);
  return add_near<Stored>(tile, sums);
}

// See gradients_of_tile in rowwise.h.
template <class Stored>
MLLOSS_VECTOR void exponential_gradients_of(const Tile<float>& tile,
                                            const RowStatistics<float>& statistics, float scale,
                                            bool stream, Stored* out) {
  stream = stream && is_aligned(out);
  const Floats positive_factor = all(quiet_scale(-scale * statistics.positive_factor));
  const Floats negative_factor = all(quiet_scale(scale * statistics.negative_factor));
  const Floats positive_shift = all(statistics.positive_shift);
  const Floats negative_shift = all(statistics.negative_shift);
  for_groups<false, Stored, Exponentials>(
      tile, Zeros<Stored>{stream, out},
      [&](const Group<Stored>& group, Exponentials& exponentials) MLLOSS_VECTOR_LAMBDA {
        Floats x[kVectors];
        load_group(group.logits, x);
        MLLOSS_FOR_VECTORS (j) {
          Floats shift = negative_shift;
          if (group.hard != 0) {
            const Mask hard = mask_from(group.hard, j);
            x[j] = flip_sign(hard, x[j]);
            shift = select(hard, positive_shift, shift);
          }
          x[j] = subtract(x[j], shift);
        }
        exponentials.start(x);
      },
      [&](const Group<Stored>& group, const Exponentials& exponentials) MLLOSS_VECTOR_LAMBDA {
        Floats values[kVectors];
        exponentials.finish(values);
        with_needs(group, [&](auto needs) MLLOSS_VECTOR_LAMBDA {
          MLLOSS_FOR_VECTORS (j) {
            Floats factor = negative_factor;
            if (needs.flipped) factor = select(mask_from(group.hard, j), positive_factor, factor);
            values[j] = multiply(factor, values[j]);
            if (needs.masked) values[j] = keep(mask_from(group.observed, j), values[j]);
          }
        });
        store_group(values, group.begin, group.count, stream, out);
      });
}

// ---- Entry points ----

// Of tiles of at most kTile elements; the kernels of wide ones call these part by part. As
// functions of their own: in a loop over parts, the compiler has too few registers left.
#define MLLOSS_KERNEL __attribute__((noinline, MLLOSS_TARGET))

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

MLLOSS_KERNEL void softplus_sum_of_part(const Tile<float>& tile, LossSum* sum) {
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    using Stored = decltype(stored);
    tile.labels.kind == TargetKind::kSoft ? soft_softplus_sum_of<Stored>(tile, sum)
                                          : softplus_sum_of<Stored>(tile, sum);
  });
}

void softplus_sum(const Tile<float>& tile, LossSum* sum) {
  for_parts(tile, [&](const Tile<float>& part, int) { softplus_sum_of_part(part, sum); });
}

MLLOSS_KERNEL double total(LossSum* sum) {
  take_logarithms(sum);
  return sum->total;
}

MLLOSS_KERNEL void softplus_gradients_of_part(const Tile<float>& tile, float scale, bool stream,
                                              void* gradients) {
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    using Stored = decltype(stored);
    auto* out = static_cast<Stored*>(gradients);
    tile.labels.kind == TargetKind::kSoft
        ? soft_softplus_gradients_of<Stored>(tile, scale, stream, out)
        : softplus_gradients_of<Stored>(tile, scale, stream, out);
  });
}

void softplus_gradients(const Tile<float>& tile, float scale, bool stream, void* gradients) {
  for_parts(tile, [&](const Tile<float>& part, int begin) {
    softplus_gradients_of_part(part, scale, stream, element_at(gradients, tile.element, begin));
  });
}

MLLOSS_KERNEL void weighted_softplus_sum(const Tile<float>& tile, const Factors& factors,
                                         LossSum* sum) {
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    weighted_softplus_sum_of<decltype(stored)>(tile, factors, sum);
  });
}

MLLOSS_KERNEL void weighted_softplus_gradients(const Tile<float>& tile, const Factors& factors,
                                               float scale, bool stream, void* gradients) {
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    weighted_softplus_gradients_of<decltype(stored)>(tile, factors, scale, stream, gradients);
  });
}

// sum and gradients of a loss, by the name of its functions.
#define MLLOSS_VECTOR_LOSS(name, Loss, Constants)                                           \
  MLLOSS_KERNEL void name##_sum(const Tile<float>& tile, const Factors& factors,            \
                                const Constants& constants, LossSum* sum) {                 \
    dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {                                  \
      sum_over_tile<decltype(stored)>(tile, factors, Loss{constants}, sum);                 \
    });                                                                                     \
  }                                                                                         \
  MLLOSS_KERNEL void name##_gradients(const Tile<float>& tile, const Factors& factors,      \
                                      const Constants& constants, float scale, bool stream, \
                                      void* gradients) {                                    \
    dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {                                  \
      gradients_over_tile<decltype(stored)>(tile, factors, Loss{constants}, scale, stream,  \
                                            gradients);                                     \
    });                                                                                     \
  }
MLLOSS_VECTOR_LOSS(focal, FocalLoss, FocalConstants)
MLLOSS_VECTOR_LOSS(asymmetric, AsymmetricLoss, AsymmetricConstants)
MLLOSS_VECTOR_LOSS(probability, ProbabilityLoss, ProbabilityConstants)
#undef MLLOSS_VECTOR_LOSS

MLLOSS_KERNEL bool exponential_sums_of_part(const Tile<float>& tile, RunningSums* sums) {
  bool done = false;
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    done = exponential_sums_of<decltype(stored)>(tile, sums);
  });
  return done;
}

int exponential_sums(const Tile<float>& tile, RunningSums* sums) {
  int taken = 0;
  bool goes_on = true;
  for_parts(tile, [&](const Tile<float>& part, int) {
    goes_on = goes_on && exponential_sums_of_part(part, sums);
    if (goes_on) taken += part.count;
  });
  return taken;
}

MLLOSS_KERNEL void exponential_gradients_of_part(const Tile<float>& tile,
                                                 const RowStatistics<float>& statistics,
                                                 float scale, bool stream, void* gradients) {
  dispatch(tile, [&](auto stored) MLLOSS_VECTOR_LAMBDA {
    using Stored = decltype(stored);
    exponential_gradients_of(tile, statistics, scale, stream, static_cast<Stored*>(gradients));
  });
}

bool exponential_gradients(const Tile<float>& tile, const RowStatistics<float>& statistics,
                           float scale, bool stream, void* gradients) {
  // Where a sum is infinite the differences to its shift may be positive.
  if (statistics.positive_factor == 0 || statistics.negative_factor == 0) return false;
  for_parts(tile, [&](const Tile<float>& part, int begin) {
    exponential_gradients_of_part(part, statistics, scale, stream,
                                  element_at(gradients, tile.element, begin));
  });
  return true;
}

MLLOSS_KERNEL int64_t count_observed_of_part(const Tile<float>& tile) {
  const LabelTile<float>& labels = tile.labels;
  const TileBits observed(labels.observed, labels.observed_bits, 0, tile.count);
  int64_t total = __builtin_popcountll(observed.of_rest());
  for (int g = 0; g < tile.count / kGroup; ++g) {
    total += __builtin_popcountll(observed.of_group(g));
  }
  return total;
}

int64_t count_observed(const Tile<float>& tile) {
  int64_t total = 0;
  for_parts(tile, [&](const Tile<float>& part, int) { total += count_observed_of_part(part); });
  return total;
}

MLLOSS_KERNEL void fence() { _mm_sfence(); }

constexpr VectorKernels kKernels = {
    total,
    softplus_sum,
    softplus_gradients,
    weighted_softplus_sum,
    weighted_softplus_gradients,
    focal_sum,
    focal_gradients,
    asymmetric_sum,
    asymmetric_gradients,
    probability_sum,
    probability_gradients,
    exponential_sums,
    exponential_gradients,
    count_observed,
    fence,
};

#undef MLLOSS_KERNEL
