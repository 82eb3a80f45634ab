// Conversions from float32 to narrower numbers: round to nearest, ties to even. Scalar and free of branches, so that
// loops over them become vectors.
#pragma once

#include "simd.h"

namespace AQ_NAMESPACE {

constexpr float kLargestFp8 = 448.0f;

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

// Below the smallest normal number the spacing is constant: adding a power of two with that spacing rounds to it.
static inline uint16_t to_f16(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  const uint32_t normal = (rest + 0xfff + ((rest >> 13) & 1) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  uint32_t half = rest < 0x38800000 ? subnormal : normal;
  half = rest >= 0x477ff000 ? 0x7c00 : half;
  half = rest > 0x7f800000 ? 0x7e00 : half;
  return static_cast<uint16_t>(sign | half);
}

// e4m3 without infinities: values beyond 448 saturate, NaN is 0x7f.
static inline uint8_t to_fp8(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 24) & 0x80, rest = bits & 0x7fffffff;
  const uint32_t normal = (rest + 0x7ffff + ((rest >> 20) & 1) - (120u << 23)) >> 20;
  const uint32_t subnormal = bits_of(float_of(rest) + 16384.0f) - bits_of(16384.0f);
  uint32_t code = rest < 0x3c800000 ? subnormal : normal;
  code = rest >= 0x43e00000 ? 0x7e : code;
  code = rest > 0x7f800000 ? 0x7f : code;
  return static_cast<uint8_t>(sign | code);
}

// The e4m3 value nearest to x, as a float; NaN stays.
static inline float nearest_fp8(float x) {
  const uint32_t bits = bits_of(x), sign = bits & 0x80000000u, rest = bits & 0x7fffffff;
  const uint32_t normal = (rest + 0x7ffff + ((rest >> 20) & 1)) & 0xfff00000u;
  const uint32_t subnormal = bits_of(float_of(bits_of(float_of(rest) + 16384.0f)) - 16384.0f);
  uint32_t value = rest < 0x3c800000 ? subnormal : normal;
  value = rest >= 0x43e00000 ? bits_of(kLargestFp8) : value;
  value = rest > 0x7f800000 ? rest : value;
  return float_of(sign | value);
}

}  // namespace AQ_NAMESPACE
