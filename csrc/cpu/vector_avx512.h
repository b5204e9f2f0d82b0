// Vectors of floats with the instructions of AVX-512; included by vector_kernels.cpp.
constexpr int kWidth = 16;

using Floats = __m512;
using Mask = __mmask16;

MLLOSS_VECTOR Floats all(float value) { return _mm512_set1_ps(value); }

MLLOSS_VECTOR Floats load(const float* data) { return _mm512_loadu_ps(data); }
MLLOSS_VECTOR Floats load(const Half* data) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
}

// The even, then the odd of two vectors' elements (other formats: load_pair in vector_loops.h).
MLLOSS_VECTOR void load_pair(const BFloat16* data, Floats& a, Floats& b) {
  const __m512i bits = _mm512_loadu_si512(data);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(kUpperHalf)));
}

// Floats in the order that load_pair has for bf16.
MLLOSS_VECTOR void load_in_pairs(const float* data, Floats& a, Floats& b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  a = _mm512_permutex2var_ps(load(data), even, load(data + kWidth));
  b = _mm512_permutex2var_ps(load(data), odd, load(data + kWidth));
}

MLLOSS_VECTOR void store(Floats values, float* out) { _mm512_storeu_ps(out, values); }

MLLOSS_VECTOR void store_bits(__m512i bits, bool stream, void* out) {
  if (stream) {
    _mm512_stream_si512(static_cast<__m512i*>(out), bits);
  } else {
    _mm512_storeu_si512(out, bits);
  }
}
// bf16 in the upper half of each element, rounded to nearest even. In integers: the instruction for
// it makes subnormals 0. NaN stays NaN unless all its lower 16 bits are set, see quiet_scale.
MLLOSS_VECTOR __m512i round_bfloat16(Floats values) {
  const __m512i bits = _mm512_castps_si512(values);
  const Mask is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(rounded, is_odd, rounded, _mm512_set1_epi32(1));
}
// Two vectors in the order of load_pair; streamed addresses are multiples of a vector.
MLLOSS_VECTOR void store_pair(Floats a, Floats b, bool stream, float* out) {
  store_bits(_mm512_castps_si512(a), stream, out);
  store_bits(_mm512_castps_si512(b), stream, out + kWidth);
}
MLLOSS_VECTOR void store_pair(Floats a, Floats b, bool stream, BFloat16* out) {
  const __m512i even = _mm512_srli_epi32(round_bfloat16(a), 16);
  constexpr int kSelect = 0xca;  // bits of the second where the first has ones, else of the third
  store_bits(
      _mm512_ternarylogic_epi32(_mm512_set1_epi32(kUpperHalf), round_bfloat16(b), even, kSelect),
      stream, out);
}
MLLOSS_VECTOR void store_pair(Floats a, Floats b, bool stream, Half* out) {
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i lower = _mm512_castsi256_si512(_mm512_cvtps_ph(a, kRounding));
  store_bits(_mm512_inserti64x4(lower, _mm512_cvtps_ph(b, kRounding), 1), stream, out);
}

MLLOSS_VECTOR Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
MLLOSS_VECTOR Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
MLLOSS_VECTOR Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
MLLOSS_VECTOR Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
MLLOSS_VECTOR Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// The larger one; b where either is NaN.
MLLOSS_VECTOR Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
MLLOSS_VECTOR Floats negate(Floats x) { return _mm512_xor_ps(x, all(-0.0f)); }
MLLOSS_VECTOR Floats minus_absolute(Floats x) { return _mm512_or_ps(x, all(-0.0f)); }

// Bits kWidth * index and following as a mask.
MLLOSS_VECTOR Mask mask_from(uint64_t bits, int index) {
  return static_cast<Mask>(bits >> (kWidth * index));
}
MLLOSS_VECTOR Mask is_negative(Floats x) { return _mm512_movepi32_mask(_mm512_castps_si512(x)); }
MLLOSS_VECTOR Mask is_zero(Floats x) { return _mm512_cmp_ps_mask(x, all(0), _CMP_EQ_OQ); }
MLLOSS_VECTOR Floats select(Mask mask, Floats a, Floats b) {
  return _mm512_mask_mov_ps(b, mask, a);
}
MLLOSS_VECTOR Floats keep(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }
MLLOSS_VECTOR Floats flip_sign(Mask mask, Floats x) {
  return _mm512_mask_xor_ps(x, mask, x, all(-0.0f));
}

// The bits of elements in the order of load_pair for bf16: of each 32 first the even, then the odd
// ones.
MLLOSS_VECTOR uint64_t in_pairs(uint64_t bits) {
  constexpr uint32_t kEven = 0x55555555;
  const auto first = static_cast<uint32_t>(bits), second = static_cast<uint32_t>(bits >> 32);
  return uint64_t(_pext_u32(first, kEven) | _pext_u32(first, ~kEven) << kWidth) |
         uint64_t(_pext_u32(second, kEven) | _pext_u32(second, ~kEven) << kWidth) << 32;
}

// The lowest `count` bits, at most 64.
MLLOSS_VECTOR uint64_t lowest_bits(int64_t count) {
  return count >= 64 ? ~uint64_t(0) : count <= 0 ? 0 : (uint64_t(1) << count) - 1;
}

// `count` bytes, at most 4 kWidth, as bits: 1 where nonzero.
MLLOSS_VECTOR uint64_t bits_of(const uint8_t* bytes, int count) {
  const __m512i values = _mm512_maskz_loadu_epi8(lowest_bits(count), bytes);
  return _mm512_test_epi8_mask(values, values);
}

// Copies `count` bytes and fills up to `padded`, a multiple of 64, with zeros. In whole vectors:
// loading a vector that was stored in parts waits for the parts.
MLLOSS_VECTOR void copy_padded(const void* source, int64_t count, int64_t padded, void* out) {
  for (int64_t i = 0; i < padded; i += 64) {
    _mm512_storeu_si512(
        static_cast<char*>(out) + i,
        _mm512_maskz_loadu_epi8(lowest_bits(count - i), static_cast<const char*>(source) + i));
  }
}

constexpr float kLeastExponent = -150;  // its exponential comes out as 0; that of -inf would as NaN

MLLOSS_VECTOR Floats nearest_integer(Floats x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// x = k ln 2 + r; k, and (e^r - 1) / r.
struct Reduced {
  Floats k, r, slope;
};
MLLOSS_VECTOR Reduced reduced(Floats x) {
  x = maximum(all(kLeastExponent), x);
  const Floats k = nearest_integer(multiply(x, all(kLog2E)));
  const Floats r = _mm512_fnmadd_ps(k, all(kLn2), x);
  Floats p = all(kExponential[0]);
  for (int i = 1; i < 5; ++i) p = multiply_add(p, r, all(kExponential[i]));
  return {k, r, p};
}

// e^x for x <= 80 (or NaN).
MLLOSS_VECTOR Floats exponential(Floats x) {
  const Reduced own = reduced(x);
  return _mm512_scalef_ps(multiply_add(own.slope, own.r, all(1)), own.k);
}

// e^x - 1 for x <= 0 (or NaN).
MLLOSS_VECTOR Floats expm1_of(Floats x) {
  const Reduced own = reduced(x);
  const Floats power = _mm512_scalef_ps(all(1), own.k);
  return multiply_add(multiply(own.slope, own.r), power, subtract(power, all(1)));
}

// Whether some element of x is greater than that of y, or not a number.
MLLOSS_VECTOR bool any_greater_or_nan(Floats x, Floats y) {
  return _mm512_cmp_ps_mask(x, y, _CMP_NLE_UQ) != 0;
}

// Exponentials of kVectors vectors in two steps. A step goes through the vectors line by line, and
// between the two there is time for other work: then what waits for each other does not fill the
// CPU's queues.
struct Exponentials {
  static constexpr bool kOverlaps = true;

  Floats k[kVectors], r[kVectors];  // the logarithms, k ln 2 + r

  // e^x for x <= 80 (or NaN).
  MLLOSS_VECTOR void start(const Floats (&x)[kVectors]) {
    MLLOSS_FOR_VECTORS (j) r[j] = maximum(all(kLeastExponent), x[j]);
    reduce();
  }

  // e^-|x|, and 0 or NaN for NaN.
  MLLOSS_VECTOR void start_of_size(const Floats (&x)[kVectors]) {
    constexpr int kSmaller = 0b10, kSigned = 0b11;
    MLLOSS_FOR_VECTORS (j) {
      // Of two numbers the one of the smaller size, with the sign set.
      r[j] = _mm512_range_ps(x[j], all(kLeastExponent), kSmaller | kSigned << 2);
    }
    reduce();
  }

  MLLOSS_VECTOR void finish(Floats (&e)[kVectors]) const {
    Floats p[kVectors];
    MLLOSS_FOR_VECTORS (j) p[j] = all(kExponential[0]);
    for (int i = 1; i < 6; ++i) {
      MLLOSS_FOR_VECTORS (j) p[j] = multiply_add(p[j], r[j], all(kExponential[i]));
    }
    MLLOSS_FOR_VECTORS (j) e[j] = _mm512_scalef_ps(p[j], k[j]);
  }

  // For finish_sigmoids.
  MLLOSS_VECTOR void start_sigmoids(const Floats (&x)[kVectors]) {
    MLLOSS_FOR_VECTORS (j) {
      const Floats limited = _mm512_min_ps(all(-kLeastExponent), x[j]);
      r[j] = negate(maximum(all(kLeastExponent), limited));
    }
    reduce();
  }
  // factor * sigmoid(x) = factor / (1 + e^-x). Where that exponential is infinite, the sigmoid
  // would be subnormal, and 0 takes its place.
  MLLOSS_VECTOR void finish_sigmoids(Floats factor, Floats (&y)[kVectors]) const {
    finish(y);
    MLLOSS_FOR_VECTORS (j) y[j] = divide(factor, add(all(1), y[j]));
  }

 private:
  MLLOSS_VECTOR void reduce() {
    MLLOSS_FOR_VECTORS (j) k[j] = nearest_integer(multiply(r[j], all(kLog2E)));
    MLLOSS_FOR_VECTORS (j) r[j] = _mm512_fnmadd_ps(k[j], all(kLn2), r[j]);
  }
};

// x = 2^exponent rest with rest in [sqrt(1/2), sqrt(2)), for normal x > 0.
struct Parts {
  Floats exponent, rest, inverse_power;
};
MLLOSS_VECTOR Parts parts_of(Floats x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i k = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  const __m512i power = _mm512_slli_epi32(k, 23);
  return {_mm512_cvtepi32_ps(k), _mm512_castsi512_ps(_mm512_sub_epi32(bits, power)),
          _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(0x3f800000), power))};
}

// Adds numbers to 8 sums.
MLLOSS_VECTOR void add_doubles(Floats x, double* sums) {
  const __m512d lower = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d upper = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_add_pd(lower, upper)));
}

MLLOSS_VECTOR double sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
MLLOSS_VECTOR float maximum_of(Floats x) { return _mm512_reduce_max_ps(x); }
