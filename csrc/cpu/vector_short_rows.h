// The loops of ShortRowKernels over the vectors of one instruction set; included by
// vector_kernels.cpp once for each, behind vector_loops.h. Rows are read and written in whole
// vectors: what lies beyond a row is masked, and what is written there is overwritten by the next.

// Labels of the `inside` first of a group of elements, as bits.
MLLOSS_VECTOR uint64_t bits_within(const uint8_t* bytes, int place, int total, uint64_t inside) {
  // Beyond the row as well, where there is something: whole vectors are read faster.
  return bits_of(bytes + place, total - place < kGroup ? total - place : kGroup) & inside;
}

// Labels of a group of elements of a row: bits of the observed positives and negatives.
struct GroupLabels {
  uint64_t hard, rest;
};

// kCount: the number of vectors that hold a row, at most kVectors; 0 for longer rows.
template <int kCount>
MLLOSS_VECTOR GroupLabels labels_of_group(const ShortRowTile& tile, int row, int begin) {
  const int place = row * tile.columns + begin, total = tile.rows * tile.columns;
  const int count = tile.columns - begin;
  uint64_t inside = count < kGroup ? (uint64_t(1) << count) - 1 : kFull;
  const uint64_t hard = tile.hard == nullptr ? 0 : bits_within(tile.hard, place, total, inside);
  if (tile.observed != nullptr) inside = bits_within(tile.observed, place, total, inside);
  return {hard & inside, inside & ~hard};
}

// Calls body(begin, vectors, labels) for the groups of a row; `vectors` is a constant for kCount >
// 0.
template <int kCount, class Body>
MLLOSS_VECTOR void for_groups_of_row(const ShortRowTile& tile, int row, const Body& body) {
  if constexpr (kCount > 0) {
    body(0, kCount, labels_of_group<kCount>(tile, row, 0));
  } else {
    for (int begin = 0; begin < tile.columns; begin += kGroup) {
      const int vectors = (tile.columns - begin + kWidth - 1) / kWidth;
      body(begin, vectors < kVectors ? vectors : kVectors,
           labels_of_group<kCount>(tile, row, begin));
    }
  }
}

template <int kCount>
MLLOSS_VECTOR void short_row_sums_of(const ShortRowTile& tile, ShortRowSums* sums) {
  const Floats nothing = all(-kInfinity<float>);
  for (int row = 0; row < tile.rows; ++row) {
    const float* logits = tile.logits + row * tile.columns;
    GroupLabels labels_of[kCount > 0 ? 1 : kTile / kGroup];
    // First the largest value of either side, positives with their sign flipped.
    Floats positive = nothing, negative = nothing;
    for_groups_of_row<kCount>(
        tile, row, [&](int begin, int vectors, GroupLabels labels) MLLOSS_VECTOR_LAMBDA {
          labels_of[begin / kGroup] = labels;
          for (int j = 0; j < vectors; ++j) {
            const Floats x = load(logits + begin + j * kWidth);
            negative = maximum(select(mask_from(labels.rest, j), x, nothing), negative);
            if (kCount == 0 && labels.hard == 0) continue;
            positive = maximum(select(mask_from(labels.hard, j), negate(x), nothing), positive);
          }
        });
    const float positive_shift = maximum_of(positive), negative_shift = maximum_of(negative);
    positive = negative = all(0);
    const auto add_group = [&](int begin, int vectors, GroupLabels labels) MLLOSS_VECTOR_LAMBDA {
      for (int j = 0; j < vectors; ++j) {
        const Floats x = load(logits + begin + j * kWidth);
        // What is left out may be larger than the shift; it is dropped.
        if (kCount == 0 && labels.hard == 0) {
          const Floats e = exponential(subtract(x, all(negative_shift)));
          negative = add(negative, keep(mask_from(labels.rest, j), e));
        } else {
          const Mask hard = mask_from(labels.hard, j);
          const Floats shift = select(hard, all(positive_shift), all(negative_shift));
          const Floats e = exponential(subtract(flip_sign(hard, x), shift));
          positive = add(positive, keep(hard, e));
          negative = add(negative, keep(mask_from(labels.rest, j), e));
        }
      }
    };
    if constexpr (kCount > 0) {
      add_group(0, kCount, labels_of[0]);
    } else {
      for (int begin = 0; begin < tile.columns; begin += kGroup) {
        const int vectors = (tile.columns - begin + kWidth - 1) / kWidth;
        add_group(begin, vectors < kVectors ? vectors : kVectors, labels_of[begin / kGroup]);
      }
    }
    sums->positive_largest[row] = positive_shift;
    sums->positive_sum[row] = static_cast<float>(sum_of(positive));
    sums->negative_largest[row] = negative_shift;
    sums->negative_sum[row] = static_cast<float>(sum_of(negative));
  }
}

// Whether the exponential of an element would have a positive argument.
MLLOSS_VECTOR bool exceeds_shifts(const ShortRowTile& tile, int row,
                                  const RowStatistics<float>& statistics) {
  for (int i = row * tile.columns; i < (row + 1) * tile.columns; ++i) {
    if (tile.observed != nullptr && tile.observed[i] == 0) continue;
    const bool hard = tile.hard != nullptr && tile.hard[i] != 0;
    const float x = tile.logits[i];
    if ((hard ? -x - statistics.positive_shift : x - statistics.negative_shift) > 0) return true;
  }
  return false;
}

template <int kCount>
MLLOSS_VECTOR bool short_row_gradients_of(const ShortRowTile& tile,
                                          const RowStatistics<float>* statistics,
                                          const double* scales, float* gradients) {
  for (int row = 0; row < tile.rows; ++row) {
    const RowStatistics<float> own = statistics[row];
    const float scale = static_cast<float>(scales[row]);
    // Where a sum is infinite; but also in rows without positives, of which there may be many.
    if ((own.positive_factor == 0 || own.negative_factor == 0) && exceeds_shifts(tile, row, own)) {
      return false;
    }
    const Floats positive_factor = all(quiet_scale(-scale * own.positive_factor));
    const Floats negative_factor = all(quiet_scale(scale * own.negative_factor));
    const Floats positive_shift = all(own.positive_shift), negative_shift = all(own.negative_shift);
    const float* logits = tile.logits + row * tile.columns;
    float* out = gradients + row * tile.columns;
    for_groups_of_row<kCount>(
        tile, row, [&](int begin, int vectors, GroupLabels labels) MLLOSS_VECTOR_LAMBDA {
          // 0 without regard to the logits.
          const uint64_t used = scales[row] == 0 ? 0 : labels.hard | labels.rest;
          for (int j = 0; j < vectors; ++j) {
            const Floats logit = load(logits + begin + j * kWidth);
            Floats value;
            if (kCount == 0 && labels.hard == 0) {
              value = multiply(negative_factor, exponential(subtract(logit, negative_shift)));
            } else {
              const Mask hard = mask_from(labels.hard, j);
              const Floats x = flip_sign(hard, logit);
              const Floats shift = select(hard, positive_shift, negative_shift);
              const Floats factor = select(hard, positive_factor, negative_factor);
              value = multiply(factor, exponential(subtract(x, shift)));
            }
            store(keep(mask_from(used, j), value), out + begin + j * kWidth);
          }
        });
  }
  return true;
}

// Calls run(count) with the number of vectors that hold a row, or 0, as a type.
template <int kCount>
struct VectorsOfRow {
  static constexpr int value = kCount;
};

template <class Run>
MLLOSS_VECTOR auto dispatch_length(int columns, const Run& run) {
  static_assert(kVectors == 4);
  switch ((columns + kWidth - 1) / kWidth) {
    case 1:
      return run(VectorsOfRow<1>{});
    case 2:
      return run(VectorsOfRow<2>{});
    case 3:
      return run(VectorsOfRow<3>{});
    case 4:
      return run(VectorsOfRow<4>{});
    default:
      return run(VectorsOfRow<0>{});
  }
}

__attribute__((MLLOSS_TARGET)) void short_row_sums(const ShortRowTile& tile, ShortRowSums* sums) {
  dispatch_length(tile.columns, [&](auto count) MLLOSS_VECTOR_LAMBDA {
    short_row_sums_of<decltype(count)::value>(tile, sums);
  });
}

__attribute__((MLLOSS_TARGET)) bool short_row_gradients(const ShortRowTile& tile,
                                                        const RowStatistics<float>* statistics,
                                                        const double* scales, float* gradients) {
  return dispatch_length(tile.columns, [&](auto count) MLLOSS_VECTOR_LAMBDA {
    return short_row_gradients_of<decltype(count)::value>(tile, statistics, scales, gradients);
  });
}

template <class Stored>
MLLOSS_VECTOR void store_all(const float* values, int count, bool stream, void* data) {
  auto* out = static_cast<Stored*>(data);
  stream = stream && is_aligned(out);
  for (int i = 0; i < count; i += kGroup) {
    // The last group may read beyond `count`, into the padding.
    Floats group[kVectors];
    load_beside<Stored>(values + i, group);
    store_group(group, i, count - i < kGroup ? count - i : kGroup, stream, out);
  }
}

__attribute__((MLLOSS_TARGET)) void store_as(const float* values, int count, Element element,
                                             bool stream, void* out) {
  if (element == Element::kBFloat16) {
    store_all<BFloat16>(values, count, stream, out);
  } else if (element == Element::kHalf) {
    store_all<Half>(values, count, stream, out);
  } else {
    store_all<float>(values, count, stream, out);
  }
}

constexpr ShortRowKernels kShortRowKernels = {short_row_sums, short_row_gradients, store_as};
