// Sixteen bytes at a time: how kernels read and write rows of any alignment.
//
// A row starts wherever its tensor and its number of labels put it. It is cut at the 16-byte
// boundaries of its logits into vectors of kWidth elements; the first and the last may stick out of
// the row and are then read element by element. Columns counted from the boundary at or before the
// row's start are called positions: position = column + shift, 0 <= shift < kWidth.
#pragma once
#include <cstdint>

#include "cuda/portability.cuh"
#include "problem.h"

namespace mlloss::cuda {

template <class Scalar>
struct Arithmetic {
  using Real = float;
};
template <>
struct Arithmetic<double> {
  using Real = double;
};

template <class T>
struct TypeTag {
  using Type = T;
};

// Calls run(TypeTag<type>) for a dtype of logits.
template <class Run>
cudaError_t dispatch_logits(Element element, const Run& run) {
  switch (element) {
    case Element::kFloat:
      return run(TypeTag<float>{});
    case Element::kHalf:
      return run(TypeTag<__half>{});
    case Element::kBFloat16:
      return run(TypeTag<__nv_bfloat16>{});
    case Element::kDouble:
      return run(TypeTag<double>{});
    default:
      return cudaErrorInvalidValue;
  }
}

__device__ __forceinline__ float to_real(float value) { return value; }
__device__ __forceinline__ double to_real(double value) { return value; }
__device__ __forceinline__ float to_real(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_real(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void from_real(float value, float* out) { *out = value; }
__device__ __forceinline__ void from_real(double value, double* out) { *out = value; }
__device__ __forceinline__ void from_real(float value, __half* out) {
  *out = __float2half_rn(value);
}
__device__ __forceinline__ void from_real(float value, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(value);
}

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using Type = uint8_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// N elements in registers; one load or store of up to 16 bytes where the address allows it.
template <class T, int N>
struct Vector {
  static constexpr int kBytes = N * sizeof(T);
  static_assert(kBytes <= 16, "one instruction moves at most 16 bytes");
  using Bits = typename Word<kBytes>::Type;
  union {
    T element[N];
    Bits bits;
  };

  __device__ __forceinline__ Vector() {}

  __device__ __forceinline__ static bool is_aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % kBytes == 0;
  }
  __device__ __forceinline__ void load(const T* address) {
    bits = *reinterpret_cast<const Bits*>(address);
  }
  __device__ __forceinline__ void store(T* address) const {
    store_global(reinterpret_cast<Bits*>(address), bits);
  }
};

// The part of a vector that lies in its row: elements [first, last).
struct Extent {
  int first, last;

  __device__ __forceinline__ bool holds(int i) const { return i >= first && i < last; }
};

// Elements per 16 bytes of logits.
template <class Scalar>
constexpr int kWidth = 16 / sizeof(Scalar);

template <int kCount>
__device__ __forceinline__ Extent extent_of(int64_t column, int64_t columns) {
  const int64_t before = -column, inside = columns - column;
  return {before > 0 ? static_cast<int>(before) : 0,
          inside < kCount ? (inside > 0 ? static_cast<int>(inside) : 0) : kCount};
}

template <int kCount>
__device__ __forceinline__ bool is_full(Extent extent) {
  return extent.first == 0 && extent.last == kCount;
}

// Elements [column, column + kCount) of a row of logits; `outside` where there are none.
template <class Scalar, class Real, int kCount>
__device__ __forceinline__ void load_logits(const Scalar* row, int64_t column, Extent extent,
                                            Real outside, Real (&out)[kCount]) {
  if (is_full<kCount>(extent)) {
    Vector<Scalar, kCount> vector;
    vector.load(row + column);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = to_real(vector.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out[i] = extent.holds(i) ? to_real(row[column + i]) : outside;
    }
  }
}

// Rounds and writes elements [column, column + kCount) of a row of the gradient, whose alignment
// may differ from that of the logits.
template <class Scalar, class Real, int kCount>
__device__ __forceinline__ void store_gradients(Scalar* row, int64_t column, Extent extent,
                                                const Real (&values)[kCount]) {
  Vector<Scalar, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) from_real(values[i], &vector.element[i]);
  Scalar* address = row + column;
  if (is_full<kCount>(extent) && Vector<Scalar, kCount>::is_aligned(address)) {
    vector.store(address);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (extent.holds(i)) address[i] = vector.element[i];
    }
  }
}

// ---- Arrays of any dtype ----

template <class Real, class T>
__device__ __forceinline__ Real convert(T value) {
  return static_cast<Real>(value);
}
template <class Real>
__device__ __forceinline__ Real convert(__half value) {
  return static_cast<Real>(__half2float(value));
}
template <class Real>
__device__ __forceinline__ Real convert(__nv_bfloat16 value) {
  return static_cast<Real>(__bfloat162float(value));
}

template <class T, class Real, int kCount>
__device__ __forceinline__ void load_elements(const T* data, int64_t stride, Extent extent,
                                              Real (&out)[kCount]) {
  constexpr int kPart = kCount * sizeof(T) > 16 ? 16 / sizeof(T) : kCount;
  if (stride == 1 && is_full<kCount>(extent) && Vector<T, kPart>::is_aligned(data)) {
#pragma unroll
    for (int part = 0; part < kCount; part += kPart) {
      Vector<T, kPart> vector;
      vector.load(data + part);
#pragma unroll
      for (int i = 0; i < kPart; ++i) out[part + i] = convert<Real>(vector.element[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (extent.holds(i)) out[i] = convert<Real>(data[i * stride]);
    }
  }
}

// out[i] = data[offset + i * stride] for the elements in `extent`; the others are left alone. The
// switch is the same for all threads, so it costs a few instructions per vector.
template <class Real, int kCount>
__device__ __forceinline__ void load_any(const void* data, Element element, int64_t offset,
                                         int64_t stride, Extent extent, Real (&out)[kCount]) {
  switch (element) {
    case Element::kBool:
      load_elements(static_cast<const uint8_t*>(data) + offset, stride, extent, out);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (extent.holds(i)) out[i] = out[i] != 0 ? Real(1) : Real(0);
      }
      break;
    case Element::kUint8:
      load_elements(static_cast<const uint8_t*>(data) + offset, stride, extent, out);
      break;
    case Element::kInt8:
      load_elements(static_cast<const int8_t*>(data) + offset, stride, extent, out);
      break;
    case Element::kInt32:
      load_elements(static_cast<const int32_t*>(data) + offset, stride, extent, out);
      break;
    case Element::kInt64:
      load_elements(static_cast<const int64_t*>(data) + offset, stride, extent, out);
      break;
    case Element::kHalf:
      load_elements(static_cast<const __half*>(data) + offset, stride, extent, out);
      break;
    case Element::kBFloat16:
      load_elements(static_cast<const __nv_bfloat16*>(data) + offset, stride, extent, out);
      break;
    case Element::kFloat:
      load_elements(static_cast<const float*>(data) + offset, stride, extent, out);
      break;
    case Element::kDouble:
      load_elements(static_cast<const double*>(data) + offset, stride, extent, out);
      break;
  }
}

// One number of an array of any dtype.
template <class Real>
__device__ __forceinline__ Real load_one(const void* data, Element element, int64_t index) {
  Real value[1];
  load_any(data, element, index, 0, {0, 1}, value);
  return value[0];
}

// Bit i of the result: data[offset + i * stride] is not 0, for the elements in `extent`.
template <int kCount>
__device__ __forceinline__ uint32_t load_bits(const uint8_t* data, int64_t stride, Extent extent) {
  uint32_t bits = 0;
  if (stride == 1 && is_full<kCount>(extent) && Vector<uint8_t, kCount>::is_aligned(data)) {
    Vector<uint8_t, kCount> vector;
    vector.load(data);
#pragma unroll
    for (int i = 0; i < kCount; ++i) bits |= (vector.element[i] != 0 ? 1u : 0u) << i;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (extent.holds(i)) bits |= (data[i * stride] != 0 ? 1u : 0u) << i;
    }
  }
  return bits;
}

// Bit i of the result: label column + i of a row of packed labels, for the elements in `extent`.
template <int kCount>
__device__ __forceinline__ uint32_t load_packed(const uint32_t* words, int64_t column,
                                                Extent extent) {
  const int64_t begin = column + extent.first;  // not before the row, where column may be
  const int count = extent.last - extent.first;
  const int64_t word = begin / 32;
  const int shift = static_cast<int>(begin % 32);
  uint32_t bits = words[word] >> shift;
  if (shift + count > 32) bits |= words[word + 1] << (32 - shift);
  return (bits & ((1u << count) - 1u)) << extent.first;
}

// Rounds and writes one number of a tensor with a dtype of logits.
template <class Real>
__device__ __forceinline__ void store_one(Real value, void* data, Element element, int64_t index) {
  switch (element) {
    case Element::kHalf:
      from_real(static_cast<float>(value), static_cast<__half*>(data) + index);
      break;
    case Element::kBFloat16:
      from_real(static_cast<float>(value), static_cast<__nv_bfloat16*>(data) + index);
      break;
    case Element::kDouble:
      static_cast<double*>(data)[index] = value;
      break;
    default:
      static_cast<float*>(data)[index] = static_cast<float>(value);
  }
}

__device__ __forceinline__ int64_t index_at(const void* data, Element element, int64_t index) {
  return element == Element::kInt32 ? static_cast<const int32_t*>(data)[index]
                                    : static_cast<const int64_t*>(data)[index];
}

}  // namespace mlloss::cuda
