// Vectors of 16 lanes, the same set of operations on every instruction set.
//
// This header and all kernel headers are compiled once per instruction set, each time inside its own namespace
// AQ_NAMESPACE, so that no function compiled for one processor can be linked in place of another's. For the same reason
// they use no templates of the standard library.
//
// Every sum of 16 lanes adds lane l and l + 8, then l + 4, l + 2, l + 1: kernels that reach the same number by
// different routes rely on it (attention.h).
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Loops over the rows and columns of a register tile have to vanish early, or the tile lives on the stack.
#if defined(__clang__)
#define AQ_UNROLL _Pragma("clang loop unroll(full)")
#else
#define AQ_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace AQ_NAMESPACE {

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Weights are read once, in order; asking for them this far ahead nearly doubles what a core reads (42 to 68 GB/s on
// two cores of a Zen 5). Addresses beyond the end are harmless.
constexpr int64_t kPrefetchBytes = 16384;

static inline void prefetch(const void* p, int64_t bytes_ahead) {
  __builtin_prefetch(static_cast<const char*>(p) + bytes_ahead);
}

static inline F32 load_scale(const void* base, int32_t type, int64_t index) {
  switch (type) {
    case 1:
      return load_f16(static_cast<const uint16_t*>(base) + index);
    case 2:
      return load_bf16(static_cast<const uint16_t*>(base) + index);
    default:
      return load(static_cast<const float*>(base) + index);
  }
}

// exp, about 1 ulp; exactly 0 below -87.3, inf above 88.3; NaN stays.
static inline F32 exp(F32 x) {
  const F32 clamped =
      min(broadcast(89.0f), max(broadcast(-87.33654f), x));  // min and max keep a NaN in the second place
  const F32 n = round(mul(clamped, broadcast(1.44269504f)));
  F32 r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  F32 p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return zero_below(mul(p, power_of_two(n)), x, -87.33654f);
}

static inline float exp_scalar(float x) {
  float lanes[16];
  store(lanes, exp(broadcast(x)));
  return lanes[0];
}

#if !defined(__AVX512VNNI__)
constexpr int64_t kBlock = 8;

// to[c][r] = from[r][c] of 8 x 8 words; strides in words.
static inline void transpose_block(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  for (int64_t r = 0; r < kBlock; r++) {
    for (int64_t c = 0; c < kBlock; c++) to[c * to_stride + r] = from[r * from_stride + c];
  }
}
#endif

}  // namespace AQ_NAMESPACE
