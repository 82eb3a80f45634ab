// AVX-512 (F, BW, VL, DQ, VNNI): one register holds 16 lanes.
#pragma once

#include <immintrin.h>

namespace AQ_NAMESPACE {

constexpr int kMaxDotRows = 6;    // rows of a register tile: 6 x 2 integer and as many float accumulators
constexpr int kMaxFloatRows = 8;  // rows of a tile of the float kernels

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct Bytes {
  __m512i v;
};

static inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

static inline F32 zero() { return {_mm512_setzero_ps()}; }
static inline F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
static inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline F32 load_first(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(first_lanes(count), p)}; }
static inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
static inline void store_first(float* p, F32 x, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), x.v); }
static inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F32 round(F32 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline F32 zero_below(F32 y, F32 x, float bound) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_LT_OQ), _mm512_setzero_ps())};
}
static inline F32 power_of_two(F32 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
// Lanes first .. last - 1 of x, `other` elsewhere.
static inline F32 select_lanes(F32 x, int64_t first, int64_t last, float other) {
  const __mmask16 keep = static_cast<__mmask16>(((1u << last) - 1) & ~((1u << first) - 1));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), keep, x.v)};
}

static inline F32 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline F32 load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
static inline F32 load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
static inline F32 load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// e4m3 shifted into binary16 has the value / 256, subnormals included; 0x7f and 0xff are NaN.
static inline F32 load_fp8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i seven = _mm_set1_epi8(0x7f);
  const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(bytes, seven), seven);
  const __m256i shifted = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), 1);
  const __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
  return {_mm512_mask_mov_ps(value, nan, _mm512_set1_ps(__builtin_nanf("")))};
}

static inline float sum(F32 x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
static inline float largest(F32 x) { return _mm512_reduce_max_ps(x.v); }

static inline I32 zero_int() { return {_mm512_setzero_si512()}; }
static inline F32 to_float(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
static inline I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline int32_t sum(I32 x) { return _mm512_reduce_add_epi32(x.v); }
static inline I32 to_nearest_int(F32 x) { return {_mm512_cvtps_epi32(x.v)}; }
static inline I32 clamp(I32 x, int32_t low, int32_t high) {
  return {_mm512_min_epi32(_mm512_max_epi32(x.v, _mm512_set1_epi32(low)), _mm512_set1_epi32(high))};
}
static inline I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
static inline int32_t largest(I32 x) { return _mm512_reduce_max_epi32(x.v); }
// The bits of |x|: as integers they are ordered like the values, NaN above all.
static inline I32 magnitude_bits(F32 x) {
  return {_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff))};
}
static inline void store_i8(int8_t* p, I32 x, int64_t count) {
  _mm512_mask_cvtsepi32_storeu_epi8(p, first_lanes(count), x.v);
}

// 16 numbers from 0 to 255.
static inline void store_u8(uint8_t* p, I32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}

static inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
// The codes of step `step` of a packed line, one a byte.
template <int kBits>
static inline Bytes unpack(Bytes line, int step) {
  if constexpr (kBits == 8) {
    return line;
  } else {
    const __m512i mask = _mm512_set1_epi8((1 << kBits) - 1);
    return {_mm512_and_si512(_mm512_srli_epi16(line.v, static_cast<unsigned>(kBits * step)), mask)};
  }
}
// The code at column `column` of step `step`, of all 16 outputs.
template <int kBits>
static inline F32 unpack_column(Bytes line, int step, int column) {
  const __m512i mask = _mm512_set1_epi32((1 << kBits) - 1);
  const __m512i shifted = _mm512_srli_epi32(line.v, static_cast<unsigned>(8 * column + kBits * step));
  return {_mm512_cvtepi32_ps(_mm512_and_si512(shifted, mask))};
}
// table[code] for the codes of unpack_column.
static inline F32 look_up(const float* table, F32 codes) {
  return {_mm512_permutexvar_ps(_mm512_cvtps_epi32(codes.v), _mm512_loadu_ps(table))};
}
// total[i] += sum over j < 4 of codes[4 i + j] (unsigned) * four[j] (signed).
template <int kBits>
static inline I32 dot4(I32 total, Bytes codes, const int8_t* four) {
  int32_t word;
  memcpy(&word, four, 4);
  return {_mm512_dpbusd_epi32(total.v, codes.v, _mm512_set1_epi32(word))};
}

// The sums of 16 vectors' lanes as one vector, added in the same order as sum().
static inline F32 sum_each(const F32* rows) {
  __m512 eight[8], four[4], two[2];
  for (int i = 0; i < 8; i++) {  // rows 2 i and 2 i + 1: 8 partial sums each, in the lower and the upper half
    const __m512 a = rows[2 * i].v, b = rows[2 * i + 1].v;
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; i++) {  // quarters hold rows 4 i, 4 i + 1, 4 i + 2, 4 i + 3
    const __m512 a = eight[2 * i], b = eight[2 * i + 1];
    four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  for (int i = 0; i < 2; i++) {  // in quarter q: rows 8 i + q (two lanes), then 8 i + 4 + q
    const __m512 a = four[2 * i], b = four[2 * i + 1];
    two[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  const __m512 one = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
  // Quarter q holds rows q, 4 + q, 8 + q, 12 + q.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_permutexvar_ps(order, one)};
}

static inline void transpose(F32* rows) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: lane j of every quarter, of rows i .. i + 3
    for (int half = 0; half < 2; half++) {
      b[i + 2 * half] = _mm512_shuffle_ps(a[i + half], a[i + 2 + half], 0x44);
      b[i + 2 * half + 1] = _mm512_shuffle_ps(a[i + half], a[i + 2 + half], 0xee);
    }
  }
  for (int j = 0; j < 4; j++) {
    const __m512 even = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), odd = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    rows[j].v = _mm512_shuffle_f32x4(even, even2, 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(even, even2, 0xdd);
    rows[4 + j].v = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    rows[12 + j].v = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

static inline void pause() { _mm_pause(); }

constexpr int64_t kBlock = 16;

// to[c][r] = from[r][c] of 16 x 16 words; strides in words.
static inline void transpose_block(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  F32 rows[kBlock];
  for (int r = 0; r < kBlock; r++) rows[r] = {_mm512_castsi512_ps(_mm512_loadu_si512(from + r * from_stride))};
  transpose(rows);
  for (int c = 0; c < kBlock; c++) _mm512_storeu_si512(to + c * to_stride, _mm512_castps_si512(rows[c].v));
}

}  // namespace AQ_NAMESPACE
