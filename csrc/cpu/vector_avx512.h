// Vectors of floats with the instructions of AVX-512; included by vector_kernels.cpp.
constexpr int kWidth = 16;

using Floats = __m512;
using Mask = __mmask16;

MLLOSS_VECTOR Floats all(float value) { return _mm512_set1_ps(value); }

MLLOSS_VECTOR Floats load(const float* data) { return _mm512_loadu_ps(data); }
MLLOSS_VECTOR Floats load(const BFloat16* data) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
MLLOSS_VECTOR Floats load(const Half* data) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
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
alignas(64) constexpr uint16_t kUpperHalves[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};

// Two vectors, one behind the other; a streamed address is a multiple of 64.
MLLOSS_VECTOR void store_pair(Floats a, Floats b, bool stream, float* out) {
  store_bits(_mm512_castps_si512(a), stream, out);
  store_bits(_mm512_castps_si512(b), stream, out + kWidth);
}
MLLOSS_VECTOR void store_pair(Floats a, Floats b, bool stream, BFloat16* out) {
  store_bits(_mm512_permutex2var_epi16(round_bfloat16(a), _mm512_load_si512(kUpperHalves),
                                       round_bfloat16(b)),
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
MLLOSS_VECTOR bool any_not_less(Floats x, Floats y) {
  return _mm512_cmp_ps_mask(x, y, _CMP_NLE_UQ) != 0;
}

// e^-|x|, and 0 for NaN, of several vectors. Step by step, so that what waits for each other does
// not fill the CPU's queues: sums of softplus gain 3 % in fp32 and 8 % in bf16 (an EPYC of Zen 5).
template <int kCount>
MLLOSS_VECTOR void exponentials_of_size(Floats (&x)[kCount]) {
  constexpr int kSmaller = 0b10, kSigned = 0b11;
  Floats k[kCount], p[kCount];
  for (int j = 0; j < kCount; ++j) {
    // Of two numbers the one of the smaller size, with the sign set.
    x[j] = _mm512_range_ps(x[j], all(kLeastExponent), kSmaller | kSigned << 2);
  }
  for (int j = 0; j < kCount; ++j) k[j] = nearest_integer(multiply(x[j], all(kLog2E)));
  for (int j = 0; j < kCount; ++j) x[j] = _mm512_fnmadd_ps(k[j], all(kLn2), x[j]);
  for (int j = 0; j < kCount; ++j) p[j] = all(kExponential[0]);
  for (int i = 1; i < 6; ++i) {
    for (int j = 0; j < kCount; ++j) p[j] = multiply_add(p[j], x[j], all(kExponential[i]));
  }
  for (int j = 0; j < kCount; ++j) x[j] = _mm512_scalef_ps(p[j], k[j]);
}

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

MLLOSS_VECTOR double sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
MLLOSS_VECTOR float maximum_of(Floats x) { return _mm512_reduce_max_ps(x); }
