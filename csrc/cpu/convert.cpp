#include "cpu/convert.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"

namespace mlloss::cpu {
namespace {

MLLOSS_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MLLOSS_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

MLLOSS_INLINE float widen(BFloat16 value) { return from_bits(uint32_t(value.bits) << 16); }

// Integer arithmetic rather than a conversion instruction, so that the loop vectorises on every
// instruction set.
MLLOSS_INLINE float widen(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  // Exponent and fraction in fp32's places; the product with 2^112 mends the exponent's bias, and
  // makes subnormals normal.
  const float scaled = from_bits(uint32_t(value.bits & 0x7fffu) << 13) * 0x1p112f;
  // Infinity and NaN come out as 2^16 and above.
  const uint32_t magnitude = to_bits(scaled) | (scaled >= 65536.0f ? 0x7f800000u : 0u);
  return from_bits(magnitude | sign);
}

template <class T>
MLLOSS_INLINE T widen(T value) {
  return value;
}

MLLOSS_INLINE void narrow(float value, float* out) { *out = value; }
MLLOSS_INLINE void narrow(double value, double* out) { *out = value; }

MLLOSS_INLINE void narrow(float value, BFloat16* out) {
  const uint32_t bits = to_bits(value);
  // Round to nearest even; NaN is kept apart, since the addition could carry it into infinity.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : rounded);
}

MLLOSS_INLINE void narrow(float value, Half* out) {
  const uint32_t bits = to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: mend the exponent's bias, round to nearest even on the 13 bits that go.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 lets the fp32 addition do the rounding.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

template <class T, class Real>
MLLOSS_INLINE void load_run(const void* data, int64_t offset, int64_t stride, int count,
                            Real* out) {
  const T* source = static_cast<const T*>(data) + offset;
  if (stride == 1) {
#pragma omp simd
    for (int i = 0; i < count; ++i) out[i] = static_cast<Real>(widen(source[i]));
  } else if (stride == 0) {
    const Real value = static_cast<Real>(widen(source[0]));
    for (int i = 0; i < count; ++i) out[i] = value;
  } else {
    for (int i = 0; i < count; ++i) out[i] = static_cast<Real>(widen(source[i * stride]));
  }
}

// A bool is read as a byte: any nonzero byte counts as true.
template <class Real>
MLLOSS_INLINE void load_bools(const void* data, int64_t offset, int64_t stride, int count,
                              Real* out) {
  const uint8_t* source = static_cast<const uint8_t*>(data) + offset;
#pragma omp simd
  for (int i = 0; i < count; ++i) out[i] = source[i * stride] != 0 ? Real(1) : Real(0);
}

// Fills rows with one number each.
template <class Real>
MLLOSS_INLINE void repeat_each(const Real* values, int rows, int columns, Real* out) {
  for (int r = 0; r < rows; ++r) {
    const Real value = values[r];
    for (int i = 0; i < columns; i += kPadding / 4) {
#pragma omp simd
      for (int j = 0; j < kPadding / 4; ++j) out[i + j] = value;
    }
    out += columns;
  }
}

template <class T>
struct TypeTag {
  using Type = T;
};

// Calls run(TypeTag<type>) for any dtype but bool.
template <class Run>
MLLOSS_INLINE void dispatch(Element element, const Run& run) {
  switch (element) {
    case Element::kBool:
    case Element::kUint8:
      return run(TypeTag<uint8_t>{});
    case Element::kInt8:
      return run(TypeTag<int8_t>{});
    case Element::kInt32:
      return run(TypeTag<int32_t>{});
    case Element::kInt64:
      return run(TypeTag<int64_t>{});
    case Element::kHalf:
      return run(TypeTag<Half>{});
    case Element::kBFloat16:
      return run(TypeTag<BFloat16>{});
    case Element::kFloat:
      return run(TypeTag<float>{});
    case Element::kDouble:
      return run(TypeTag<double>{});
  }
}

template <class Real>
MLLOSS_INLINE void load_any(const void* data, Element element, int64_t offset, int64_t stride,
                            int count, Real* out) {
  if (element == Element::kBool) return load_bools(data, offset, stride, count, out);
  dispatch(element, [=](auto tag) __attribute__((always_inline)) {
    load_run<typename decltype(tag)::Type>(data, offset, stride, count, out);
  });
}

template <class Real>
void gather_any(const void* data, Element element, int64_t offset, int64_t stride,
                const int64_t* columns, int count, Real* out) {
  dispatch(element, [=](auto tag) {
    const auto* source = static_cast<const typename decltype(tag)::Type*>(data) + offset;
    for (int i = 0; i < count; ++i) {
      out[i] = static_cast<Real>(widen(source[columns[i] * stride]));
    }
  });
  if (element != Element::kBool) return;
  for (int i = 0; i < count; ++i) out[i] = out[i] != 0 ? Real(1) : Real(0);
}

template <class T, class Real>
void scatter_run(const Real* values, const int64_t* columns, int count, void* data,
                 int64_t offset) {
  T* out = static_cast<T*>(data) + offset;
  for (int i = 0; i < count; ++i) narrow(values[i], out + columns[i]);
}

template <class T, class Real>
MLLOSS_INLINE void store_run(const Real* values, int count, void* data, int64_t offset) {
  T* out = static_cast<T*>(data) + offset;
#pragma omp simd
  for (int i = 0; i < count; ++i) narrow(values[i], out + i);
}

}  // namespace

MLLOSS_CLONES
void load(const void* data, Element element, int64_t offset, int64_t stride, int count,
          float* out) {
  load_any(data, element, offset, stride, count, out);
}

MLLOSS_CLONES
void load(const void* data, Element element, int64_t offset, int64_t stride, int count,
          double* out) {
  load_any(data, element, offset, stride, count, out);
}

namespace {

MLLOSS_CLONES void repeat(const float* values, int rows, int columns, float* out) {
  repeat_each(values, rows, columns, out);
}
MLLOSS_CLONES void repeat(const double* values, int rows, int columns, double* out) {
  repeat_each(values, rows, columns, out);
}

template <class Real>
void load_rows_any(const void* data, Element element, int64_t offset, int64_t row_stride,
                   int64_t stride, int rows, int columns, Real* out) {
  if (rows == 1 || (row_stride == columns && stride == 1)) {
    load(data, element, offset, stride, rows * columns, out);
  } else if (stride == 0) {
    constexpr int kRun = 64;
    Real values[kRun];
    for (int r = 0; r < rows; r += kRun) {
      const int run = std::min(kRun, rows - r);
      load(data, element, offset + r * row_stride, row_stride, run, values);
      repeat(values, run, columns, out + r * columns);
    }
  } else if (row_stride == 0) {
    load(data, element, offset, stride, columns, out);
    const int count = rows * columns;
    for (int filled = columns; filled < count; filled *= 2) {
      std::memcpy(out + filled, out, sizeof(Real) * std::min(filled, count - filled));
    }
  } else {
    for (int r = 0; r < rows; ++r) {
      load(data, element, offset + r * row_stride, stride, columns, out + r * columns);
    }
  }
}

}  // namespace

void load_rows(const void* data, Element element, int64_t offset, int64_t row_stride,
               int64_t stride, int rows, int columns, float* out) {
  load_rows_any(data, element, offset, row_stride, stride, rows, columns, out);
}

void load_rows(const void* data, Element element, int64_t offset, int64_t row_stride,
               int64_t stride, int rows, int columns, double* out) {
  load_rows_any(data, element, offset, row_stride, stride, rows, columns, out);
}

void gather(const void* data, Element element, int64_t offset, int64_t stride,
            const int64_t* columns, int count, float* out) {
  gather_any(data, element, offset, stride, columns, count, out);
}

void gather(const void* data, Element element, int64_t offset, int64_t stride,
            const int64_t* columns, int count, double* out) {
  gather_any(data, element, offset, stride, columns, count, out);
}

void scatter(const float* values, const int64_t* columns, int count, void* data, Element element,
             int64_t offset) {
  switch (element) {
    case Element::kHalf:
      return scatter_run<Half>(values, columns, count, data, offset);
    case Element::kBFloat16:
      return scatter_run<BFloat16>(values, columns, count, data, offset);
    default:
      return scatter_run<float>(values, columns, count, data, offset);
  }
}

void scatter(const double* values, const int64_t* columns, int count, void* data, Element,
             int64_t offset) {
  scatter_run<double>(values, columns, count, data, offset);
}

MLLOSS_CLONES
void store(const float* values, int count, void* data, Element element, int64_t offset) {
  switch (element) {
    case Element::kHalf:
      return store_run<Half>(values, count, data, offset);
    case Element::kBFloat16:
      return store_run<BFloat16>(values, count, data, offset);
    default:
      return store_run<float>(values, count, data, offset);
  }
}

void store(const double* values, int count, void* data, Element, int64_t offset) {
  std::memcpy(static_cast<double*>(data) + offset, values, sizeof(double) * count);
}

void zero_row(const Problem& problem, int64_t row, void* grad_input) {
  zero_run(grad_input, problem.element, row * problem.columns, problem.columns);
}

void zero_run(void* data, Element element, int64_t offset, int64_t count) {
  const int64_t size = element_size(element);
  std::memset(static_cast<char*>(data) + offset * size, 0, static_cast<size_t>(count * size));
}

}  // namespace mlloss::cpu
