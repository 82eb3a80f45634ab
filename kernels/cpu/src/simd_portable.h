// Any processor: plain loops over arrays, which the compiler turns into whatever vectors it may use.
#pragma once

#include <math.h>

namespace AQ_NAMESPACE {

constexpr int kMaxDotRows = 1;
constexpr int kMaxFloatRows = 2;

struct F32 {
  float v[16];
};
struct I32 {
  int32_t v[16];
};
struct Bytes {
  uint8_t v[64];
};

#define AQ_LANES(expression)                        \
  F32 y;                                            \
  for (int i = 0; i < 16; i++) y.v[i] = expression; \
  return y

static inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline F32 broadcast(float x) { AQ_LANES(x); }
static inline F32 zero() { return broadcast(0.0f); }
static inline F32 load(const float* p) { AQ_LANES(p[i]); }
static inline F32 load_first(const float* p, int64_t count) { AQ_LANES(i < count ? p[i] : 0.0f); }
static inline void store(float* p, F32 x) { memcpy(p, x.v, sizeof x.v); }
static inline void store_first(float* p, F32 x, int64_t count) {
  for (int64_t i = 0; i < count; i++) p[i] = x.v[i];
}
static inline F32 add(F32 a, F32 b) { AQ_LANES(a.v[i] + b.v[i]); }
static inline F32 sub(F32 a, F32 b) { AQ_LANES(a.v[i] - b.v[i]); }
static inline F32 mul(F32 a, F32 b) { AQ_LANES(a.v[i] * b.v[i]); }
static inline F32 div(F32 a, F32 b) { AQ_LANES(a.v[i] / b.v[i]); }
static inline F32 fma(F32 a, F32 b, F32 c) { AQ_LANES(a.v[i] * b.v[i] + c.v[i]); }
static inline F32 min(F32 a, F32 b) { AQ_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline F32 max(F32 a, F32 b) { AQ_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
// Adding 1.5 * 2**23 rounds to the nearest integer, ties to even, for |x| < 2**22.
static inline float round_small(float x) {
  volatile float shifted = x + 12582912.0f;
  return shifted - 12582912.0f;
}
static inline F32 round(F32 x) { AQ_LANES(round_small(x.v[i])); }
static inline F32 zero_below(F32 y_in, F32 x, float bound) { AQ_LANES(x.v[i] < bound ? 0.0f : y_in.v[i]); }
static inline F32 power_of_two(F32 n) {
  AQ_LANES(n.v[i] == n.v[i] ? from_bits(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23) : n.v[i]);
}
// Lanes first .. last - 1 of x, `other` elsewhere.
static inline F32 select_lanes(F32 x, int64_t first, int64_t last, float other) {
  AQ_LANES(i >= first && i < last ? x.v[i] : other);
}

static inline float f16_to_float(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
  if (rest >= 0x0f800000) return from_bits(sign | 0x70000000 | rest);         // inf and NaN
  return from_bits(sign | to_bits(from_bits(rest) * 5.192296858534828e33f));  // times 2**112
}
static inline float fp8_to_float(uint32_t code) {
  if ((code & 0x7f) == 0x7f) return __builtin_nanf("");
  return f16_to_float((code & 0x80) << 8 | (code & 0x7f) << 7) * 256.0f;
}
static inline F32 load_f16(const uint16_t* p) { AQ_LANES(f16_to_float(p[i])); }
static inline F32 load_bf16(const uint16_t* p) { AQ_LANES(from_bits(static_cast<uint32_t>(p[i]) << 16)); }
static inline F32 load_u8(const uint8_t* p) { AQ_LANES(p[i]); }
static inline F32 load_i8(const int8_t* p) { AQ_LANES(p[i]); }
static inline F32 load_fp8(const uint8_t* p) { AQ_LANES(fp8_to_float(p[i])); }

static inline float sum(F32 x) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) x.v[i] = x.v[i] + x.v[i + width];
  }
  return x.v[0];
}
static inline float largest(F32 x) {
  float top = x.v[0];
  for (int i = 1; i < 16; i++) top = x.v[i] > top ? x.v[i] : top;
  return top;
}
static inline I32 zero_int() {
  I32 y;
  memset(y.v, 0, sizeof y.v);
  return y;
}
static inline F32 to_float(I32 x) { AQ_LANES(static_cast<float>(x.v[i])); }
static inline I32 add(I32 a, I32 b) {
  for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
  return a;
}
static inline int32_t sum(I32 x) {
  int32_t total = 0;
  for (int i = 0; i < 16; i++) total += x.v[i];
  return total;
}
// Values outside the integers' range, and NaN, become the lowest integer, as on x86.
static inline I32 to_nearest_int(F32 x) {
  I32 y;
  for (int i = 0; i < 16; i++) {
    const bool fits = x.v[i] > -4194304.0f && x.v[i] < 4194304.0f;
    y.v[i] = fits ? static_cast<int32_t>(round_small(x.v[i])) : INT32_MIN;
  }
  return y;
}
static inline I32 clamp(I32 x, int32_t low, int32_t high) {
  for (int i = 0; i < 16; i++) x.v[i] = x.v[i] < low ? low : x.v[i] > high ? high : x.v[i];
  return x;
}
static inline I32 max(I32 a, I32 b) {
  for (int i = 0; i < 16; i++) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
static inline int32_t largest(I32 x) {
  int32_t top = x.v[0];
  for (int i = 1; i < 16; i++) top = x.v[i] > top ? x.v[i] : top;
  return top;
}
// The bits of |x|: as integers they are ordered like the values, NaN above all.
static inline I32 magnitude_bits(F32 x) {
  I32 y;
  for (int i = 0; i < 16; i++) y.v[i] = static_cast<int32_t>(to_bits(x.v[i]) & 0x7fffffff);
  return y;
}
static inline void store_i8(int8_t* p, I32 x, int64_t count) {
  for (int64_t i = 0; i < count; i++) p[i] = static_cast<int8_t>(x.v[i]);
}
// 16 numbers from 0 to 255.
static inline void store_u8(uint8_t* p, I32 x) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<uint8_t>(x.v[i]);
}

static inline Bytes load_bytes(const uint8_t* p) {
  Bytes y;
  memcpy(y.v, p, sizeof y.v);
  return y;
}
// The codes of step `step` of a packed line, one a byte.
template <int kBits>
static inline Bytes unpack(Bytes line, int step) {
  for (int i = 0; i < 64; i++) line.v[i] = (line.v[i] >> (kBits * step) % 8) & ((1 << kBits) - 1);
  return line;
}
// The code at column `column` of step `step`, of all 16 outputs.
template <int kBits>
static inline F32 unpack_column(Bytes line, int step, int column) {
  AQ_LANES(static_cast<float>((line.v[4 * i + column] >> (kBits * step) % 8) & ((1 << kBits) - 1)));
}
// table[code] for the codes of unpack_column.
static inline F32 look_up(const float* table, F32 codes) { AQ_LANES(table[static_cast<int>(codes.v[i])]); }
// total[i] += sum over j < 4 of codes[4 i + j] (unsigned) * four[j] (signed).
template <int kBits>
static inline I32 dot4(I32 total, Bytes codes, const int8_t* four) {
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 4; j++) total.v[i] += codes.v[4 * i + j] * four[j];
  }
  return total;
}

// The sums of 16 vectors' lanes as one vector, added in the same order as sum().
static inline F32 sum_each(const F32* rows) { AQ_LANES(sum(rows[i])); }

static inline void transpose(F32* rows) {
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < i; j++) {
      const float kept = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = kept;
    }
  }
}

static inline void pause() {}

#undef AQ_LANES

}  // namespace AQ_NAMESPACE
