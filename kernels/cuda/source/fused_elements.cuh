// Activations in memory and in registers: bf16 or fp16 elements, moved in vectors of up to 16 bytes, computed in float32.
//
// Macros: ELEMENT_IS_BF16 (1: bf16, 0: fp16).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#ifndef ELEMENT_IS_BF16
#define ELEMENT_IS_BF16 1
#endif

#if ELEMENT_IS_BF16
typedef __nv_bfloat16 Element;
__device__ __forceinline__ float to_float(Element x) { return __bfloat162float(x); }
__device__ __forceinline__ Element to_element(float x) { return __float2bfloat16_rn(x); }
#else
typedef __half Element;
__device__ __forceinline__ float to_float(Element x) { return __half2float(x); }
__device__ __forceinline__ Element to_element(float x) { return __float2half_rn(x); }
#endif

// The widest vector, at most `limit` items, that divides a row of `size` items.
__host__ __device__ constexpr int vector_width(int size, int limit) {
  return limit == 1 || size % limit == 0 ? limit : vector_width(size, limit / 2);
}

// COUNT items of T that are loaded and stored by one instruction (up to 16 bytes) or a few.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT < 16 ? sizeof(T) * COUNT : 16) Vector {
  T items[COUNT];
};

template <int COUNT>
__device__ __forceinline__ void load(const Element* source, float (&values)[COUNT]) {
  const Vector<Element, COUNT> vector = *reinterpret_cast<const Vector<Element, COUNT>*>(source);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] = to_float(vector.items[i]);
}

template <int COUNT>
__device__ __forceinline__ void load(const float* source, float (&values)[COUNT]) {
  const Vector<float, COUNT> vector = *reinterpret_cast<const Vector<float, COUNT>*>(source);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] = vector.items[i];
}

template <int COUNT>
__device__ __forceinline__ void store(float* target, const float (&values)[COUNT]) {
  Vector<float, COUNT> vector;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) vector.items[i] = values[i];
  *reinterpret_cast<Vector<float, COUNT>*>(target) = vector;
}

template <int COUNT>
__device__ __forceinline__ void store(Element* target, const float (&values)[COUNT]) {
  Vector<Element, COUNT> vector;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) vector.items[i] = to_element(values[i]);
  *reinterpret_cast<Vector<Element, COUNT>*>(target) = vector;
}

// The code of x / scale in FP8 e4m3: nearest even, saturating at 448, NaN stays NaN.
__device__ __forceinline__ unsigned char float8_code(float x, float scale) {
  return __nv_cvt_float_to_fp8(__fdiv_rn(x, scale), __NV_SATFINITE, __NV_E4M3);
}

// The code of x / scale as a signed 8-bit integer: nearest even, within -127 .. 127.
__device__ __forceinline__ signed char int8_code(float x, float scale) {
  return static_cast<signed char>(fminf(fmaxf(rintf(__fdiv_rn(x, scale)), -127.0f), 127.0f));
}

// |x| as bits: ordered like the magnitudes, with NaN above infinity, so that a maximum of them keeps a NaN.
__device__ __forceinline__ unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// absmax / top; 1 for a row of zeros.
__device__ __forceinline__ float dynamic_scale(unsigned absmax_bits, float top) {
  return absmax_bits == 0 ? 1.0f : __fdiv_rn(__uint_as_float(absmax_bits), top);
}
