// Vectors of floats with the instructions of AVX2 and FMA; included by vector_kernels.cpp.
constexpr int kWidth = 8;

using Floats = __m256;
using Mask = __m256;  // all bits of an element, or none

MLLOSS_VECTOR Floats all(float value) { return _mm256_set1_ps(value); }

MLLOSS_VECTOR Floats load(const float* data) { return _mm256_loadu_ps(data); }
MLLOSS_VECTOR Floats load(const Half* data) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
}

// The even, then the odd of two vectors' elements (other formats: load_pair in vector_loops.h).
MLLOSS_VECTOR void load_pair(const BFloat16* data, Floats& a, Floats& b) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  b = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(kUpperHalf)));
}

// Floats in the order that load_pair has for bf16.
MLLOSS_VECTOR void load_in_pairs(const float* data, Floats& a, Floats& b) {
  // Shuffling goes by halves of a vector.
  constexpr int kEven = 0b10001000, kOdd = 0b11011101, kMiddle = 0b11011000;
  const Floats x = load(data), y = load(data + kWidth);
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(x, y, kEven));
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(x, y, kOdd));
  a = _mm256_castpd_ps(_mm256_permute4x64_pd(even, kMiddle));
  b = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, kMiddle));
}

MLLOSS_VECTOR void store(Floats values, float* out) { _mm256_storeu_ps(out, values); }

MLLOSS_VECTOR void store_bits(__m256i bits, bool stream, void* out) {
  if (stream) {
    _mm256_stream_si256(static_cast<__m256i*>(out), bits);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(out), bits);
  }
}
// bf16 in the upper half of each element, rounded to nearest even. NaN stays NaN unless all its
// lower 16 bits are set, see quiet_scale.
MLLOSS_VECTOR __m256i round_bfloat16(Floats values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

// Two vectors in the order of load_pair; streamed addresses are multiples of a vector.
MLLOSS_VECTOR void store_pair(Floats a, Floats b, bool stream, float* out) {
  store_bits(_mm256_castps_si256(a), stream, out);
  store_bits(_mm256_castps_si256(b), stream, out + kWidth);
}
MLLOSS_VECTOR void store_pair(Floats a, Floats b, bool stream, BFloat16* out) {
  const __m256i even = _mm256_srli_epi32(round_bfloat16(a), 16);
  constexpr int kOdd = 0b10101010;
  store_bits(_mm256_blend_epi16(even, round_bfloat16(b), kOdd), stream, out);
}
MLLOSS_VECTOR void store_pair(Floats a, Floats b, bool stream, Half* out) {
  const __m256i lower = _mm256_castsi128_si256(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  const __m128i upper = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  store_bits(_mm256_inserti128_si256(lower, upper, 1), stream, out);
}

MLLOSS_VECTOR Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
MLLOSS_VECTOR Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
MLLOSS_VECTOR Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
MLLOSS_VECTOR Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
MLLOSS_VECTOR Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
// The larger one; b where either is NaN.
MLLOSS_VECTOR Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
MLLOSS_VECTOR Floats negate(Floats x) { return _mm256_xor_ps(x, all(-0.0f)); }
MLLOSS_VECTOR Floats minus_absolute(Floats x) { return _mm256_or_ps(x, all(-0.0f)); }

// Bits kWidth * index and following as a mask.
MLLOSS_VECTOR Mask mask_from(uint64_t bits, int index) {
  const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i own = _mm256_set1_epi32(static_cast<int>(bits >> (kWidth * index)));
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(own, places), places));
}
// By the sign bit, which is all that a selection looks at.
MLLOSS_VECTOR Mask is_negative(Floats x) { return x; }
MLLOSS_VECTOR Mask is_zero(Floats x) { return _mm256_cmp_ps(x, all(0), _CMP_EQ_OQ); }
MLLOSS_VECTOR Floats select(Mask mask, Floats a, Floats b) { return _mm256_blendv_ps(b, a, mask); }
MLLOSS_VECTOR Floats keep(Mask mask, Floats x) { return _mm256_and_ps(mask, x); }
MLLOSS_VECTOR Floats flip_sign(Mask mask, Floats x) {
  return _mm256_xor_ps(x, _mm256_and_ps(mask, all(-0.0f)));
}

// The bits of elements in the order of load_pair for bf16: of each 16 first the even, then the odd
// ones. In steps that swap neighbours, then pairs, then fours, as there are CPUs with AVX2 on which
// the instruction for it is slow.
MLLOSS_VECTOR uint64_t in_pairs(uint64_t bits) {
  auto x = static_cast<uint32_t>(bits);
  const auto swap = [&](int distance, uint32_t lower) MLLOSS_VECTOR_LAMBDA {
    const uint32_t different = (x ^ x >> distance) & lower;
    x ^= different | different << distance;
  };
  swap(1, 0x22222222);
  swap(2, 0x0c0c0c0c);
  swap(4, 0x00f000f0);
  return x;
}

// `count` bytes, at most 4 kWidth, as bits: 1 where nonzero.
MLLOSS_VECTOR uint64_t bits_of(const uint8_t* bytes, int count) {
  if (count < 4 * kWidth) {
    uint64_t bits = 0;
    for (int i = 0; i < count; ++i) bits |= uint64_t(bytes[i] != 0) << i;
    return bits;
  }
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  const __m256i zero = _mm256_cmpeq_epi8(values, _mm256_setzero_si256());
  return static_cast<uint32_t>(~_mm256_movemask_epi8(zero));
}

// Copies `count` bytes and fills up to `padded` with zeros.
MLLOSS_VECTOR void copy_padded(const void* source, int64_t count, int64_t padded, void* out) {
  std::memcpy(out, source, count);
  std::memset(static_cast<char*>(out) + count, 0, padded - count);
}

// x = k ln 2 + r; 2^k, and (e^r - 1) / r.
struct Reduced {
  Floats power, r, slope;
};
MLLOSS_VECTOR Reduced reduced(Floats x) {
  // Adding 1.5 * 2^23 rounds to an integer, and leaves that integer in the low bits.
  const Floats round = all(12582912.0f);
  const Floats shifted = multiply_add(x, all(kLog2E), round);
  const Floats r = _mm256_fnmadd_ps(subtract(shifted, round), all(kLn2), x);
  Floats p = all(kExponential[0]);
  for (int i = 1; i < 5; ++i) p = multiply_add(p, r, all(kExponential[i]));
  const __m256i power = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23),
                                         _mm256_set1_epi32(0x3f800000));
  return {_mm256_castsi256_ps(power), r, p};
}

// e^x for x <= 80 (or NaN). Results below 1.2e-38, which are subnormal, are 0.
MLLOSS_VECTOR Floats exponential(Floats x) {
  const Reduced own = reduced(x);
  const Mask is_tiny = _mm256_cmp_ps(x, all(-87.3365448f), _CMP_LT_OQ);
  return _mm256_andnot_ps(is_tiny, multiply(multiply_add(own.slope, own.r, all(1)), own.power));
}

// e^x - 1 for x <= 0 (or NaN).
MLLOSS_VECTOR Floats expm1_of(Floats x) {
  const Reduced own = reduced(maximum(all(-87), x));
  return multiply_add(multiply(own.slope, own.r), own.power, subtract(own.power, all(1)));
}

// Whether some element of x is greater than that of y, or not a number.
MLLOSS_VECTOR bool any_greater_or_nan(Floats x, Floats y) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_NLE_UQ)) != 0;
}

// Exponentials of kVectors vectors; in two steps, as for other instruction sets. There are too few
// registers to do other work in between.
struct Exponentials {
  static constexpr bool kOverlaps = false;

  Floats x[kVectors];

  // e^x for x <= 80 (or NaN).
  MLLOSS_VECTOR void start(const Floats (&values)[kVectors]) {
    MLLOSS_FOR_VECTORS (j) x[j] = values[j];
  }
  // e^-|x|, and NaN for NaN
  MLLOSS_VECTOR void start_of_size(const Floats (&values)[kVectors]) {
    MLLOSS_FOR_VECTORS (j) x[j] = minus_absolute(values[j]);
  }
  MLLOSS_VECTOR void finish(Floats (&e)[kVectors]) const {
    MLLOSS_FOR_VECTORS (j) e[j] = exponential(x[j]);
  }

  // For finish_sigmoids.
  MLLOSS_VECTOR void start_sigmoids(const Floats (&values)[kVectors]) { start(values); }
  // factor * sigmoid(x)
  MLLOSS_VECTOR void finish_sigmoids(Floats factor, Floats (&y)[kVectors]) const {
    MLLOSS_FOR_VECTORS (j) {
      const Floats e = exponential(minus_absolute(x[j]));
      y[j] = divide(select(is_negative(x[j]), multiply(factor, e), factor), add(all(1), e));
    }
  }
};

// x = 2^exponent rest with rest in [sqrt(1/2), sqrt(2)), for normal x > 0.
struct Parts {
  Floats exponent, rest, inverse_power;
};
MLLOSS_VECTOR Parts parts_of(Floats x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i k = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  const __m256i power = _mm256_slli_epi32(k, 23);
  return {_mm256_cvtepi32_ps(k), _mm256_castsi256_ps(_mm256_sub_epi32(bits, power)),
          _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(0x3f800000), power))};
}

// Adds numbers to 8 sums.
MLLOSS_VECTOR void add_doubles(Floats x, double* sums) {
  const __m256d lower = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  const __m256d upper = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), lower));
  _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), upper));
}

MLLOSS_VECTOR double sum_of(Floats x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
MLLOSS_VECTOR float maximum_of(Floats x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
