// AVX2 with FMA and F16C: 16 lanes are two registers. With AVX-VNNI the integer dot products are single instructions.
#pragma once

#include <immintrin.h>

namespace AQ_NAMESPACE {

constexpr int kMaxDotRows = 2;
constexpr int kMaxFloatRows = 4;

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};
struct Bytes {
  __m256i lo, hi;
};

static inline __m256i first_lanes(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
}
static inline __m256i int_bits(__m256 x) { return _mm256_castps_si256(x); }
static inline __m256 float_bits(__m256i x) { return _mm256_castsi256_ps(x); }

static inline F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F32 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline F32 load_first(const float* p, int64_t count) {
  return {_mm256_maskload_ps(p, first_lanes(count)), _mm256_maskload_ps(p + 8, first_lanes(count - 8))};
}
static inline void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
static inline void store_first(float* p, F32 x, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), x.lo);
  _mm256_maskstore_ps(p + 8, first_lanes(count - 8), x.hi);
}
static inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
static inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
static inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
static inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
static inline F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
static inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
static inline F32 round(F32 x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.lo, kMode), _mm256_round_ps(x.hi, kMode)};
}
static inline F32 zero_below(F32 y, F32 x, float bound) {
  const __m256 limit = _mm256_set1_ps(bound);
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.lo, limit, _CMP_LT_OQ), y.lo),
          _mm256_andnot_ps(_mm256_cmp_ps(x.hi, limit, _CMP_LT_OQ), y.hi)};
}
static inline __m256 power_of_two(__m256 n) {
  return float_bits(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline F32 power_of_two(F32 n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }
// Lanes first .. last - 1 of x, `other` elsewhere.
static inline F32 select_lanes(F32 x, int64_t first, int64_t last, float other) {
  const __m256 fill = _mm256_set1_ps(other);
  const __m256i lo = _mm256_andnot_si256(first_lanes(first), first_lanes(last));
  const __m256i hi = _mm256_andnot_si256(first_lanes(first - 8), first_lanes(last - 8));
  return {_mm256_blendv_ps(fill, x.lo, float_bits(lo)), _mm256_blendv_ps(fill, x.hi, float_bits(hi))};
}

static inline F32 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
static inline F32 load_bf16(const uint16_t* p) {
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  return {float_bits(_mm256_slli_epi32(lo, 16)), float_bits(_mm256_slli_epi32(hi, 16))};
}
static inline F32 load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
static inline F32 load_i8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
// e4m3 shifted into binary16 has the value / 256, subnormals included; 0x7f and 0xff are NaN.
static inline F32 load_fp8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i seven = _mm_set1_epi8(0x7f);
  const __m128i nan = _mm_cmpeq_epi8(_mm_and_si128(bytes, seven), seven);
  const __m256i shifted = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), 1);
  const __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  const __m256 scale = _mm256_set1_ps(256.0f);
  const __m256 lo = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), scale);
  const __m256 hi = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), scale);
  return {_mm256_or_ps(lo, float_bits(_mm256_cvtepi8_epi32(nan))),  // all bits set: a NaN
          _mm256_or_ps(hi, float_bits(_mm256_cvtepi8_epi32(_mm_srli_si128(nan, 8))))};
}

static inline float sum(F32 x) {
  const __m256 half = _mm256_add_ps(x.lo, x.hi);
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
static inline float largest(F32 x) {
  const __m256 half = _mm256_max_ps(x.lo, x.hi);
  const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
static inline I32 zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
static inline I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
static inline int32_t sum(I32 x) {
  const __m256i both = _mm256_add_epi32(x.lo, x.hi);
  __m128i total = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(total, _mm_shuffle_epi32(total, 0xb1)));
}
static inline I32 to_nearest_int(F32 x) { return {_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)}; }
static inline I32 clamp(I32 x, int32_t low, int32_t high) {
  const __m256i bottom = _mm256_set1_epi32(low), top = _mm256_set1_epi32(high);
  return {_mm256_min_epi32(_mm256_max_epi32(x.lo, bottom), top), _mm256_min_epi32(_mm256_max_epi32(x.hi, bottom), top)};
}
static inline I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
static inline int32_t largest(I32 x) {
  const __m256i both = _mm256_max_epi32(x.lo, x.hi);
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1)));
}
// The bits of |x|: as integers they are ordered like the values, NaN above all.
static inline I32 magnitude_bits(F32 x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(int_bits(x.lo), mask), _mm256_and_si256(int_bits(x.hi), mask)};
}
static inline void store_i8(int8_t* p, I32 x, int64_t count) {
  int32_t lanes[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), x.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes + 8), x.hi);
  for (int64_t i = 0; i < count; i++) p[i] = static_cast<int8_t>(lanes[i]);
}
// 16 numbers from 0 to 255.
static inline void store_u8(uint8_t* p, I32 x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.lo, x.hi), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

static inline Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
// The codes of step `step` of a packed line, one a byte.
template <int kBits>
static inline Bytes unpack(Bytes line, int step) {
  if constexpr (kBits == 8) {
    return line;
  } else {
    const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1);
    return {_mm256_and_si256(_mm256_srli_epi16(line.lo, kBits * step), mask),
            _mm256_and_si256(_mm256_srli_epi16(line.hi, kBits * step), mask)};
  }
}
// The code at column `column` of step `step`, of all 16 outputs.
template <int kBits>
static inline F32 unpack_column(Bytes line, int step, int column) {
  const __m256i mask = _mm256_set1_epi32((1 << kBits) - 1);
  const int shift = 8 * column + kBits * step;
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(line.lo, shift), mask)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(line.hi, shift), mask))};
}
static inline __m256i dot4_small(__m256i codes, __m256i four) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, four), _mm256_set1_epi16(1));
}
// table[code] for the codes of unpack_column.
static inline __m256 look_up(const float* table, __m256 codes) {
  return _mm256_i32gather_ps(table, _mm256_cvtps_epi32(codes), 4);
}
static inline F32 look_up(const float* table, F32 codes) {
  return {look_up(table, codes.lo), look_up(table, codes.hi)};
}
// total[i] += sum over j < 4 of codes[4 i + j] (unsigned) * four[j] (signed).
template <int kBits>
static inline I32 dot4(I32 total, Bytes codes, const int8_t* four) {
  int32_t word;
  memcpy(&word, four, 4);
  const __m256i repeated = _mm256_set1_epi32(word);
#if defined(__AVXVNNI__)
  return {_mm256_dpbusd_avx_epi32(total.lo, codes.lo, repeated), _mm256_dpbusd_avx_epi32(total.hi, codes.hi, repeated)};
#else
  if constexpr (kBits < 8) {
    return {_mm256_add_epi32(total.lo, dot4_small(codes.lo, repeated)),
            _mm256_add_epi32(total.hi, dot4_small(codes.hi, repeated))};
  } else {  // maddubs saturates at 16 bits: the low and the high four bits of the codes are multiplied apart
    const __m256i mask = _mm256_set1_epi8(15);
    I32 low = {dot4_small(_mm256_and_si256(codes.lo, mask), repeated),
               dot4_small(_mm256_and_si256(codes.hi, mask), repeated)};
    const __m256i upper_lo = _mm256_and_si256(_mm256_srli_epi16(codes.lo, 4), mask);
    const __m256i upper_hi = _mm256_and_si256(_mm256_srli_epi16(codes.hi, 4), mask);
    low.lo = _mm256_add_epi32(low.lo, _mm256_slli_epi32(dot4_small(upper_lo, repeated), 4));
    low.hi = _mm256_add_epi32(low.hi, _mm256_slli_epi32(dot4_small(upper_hi, repeated), 4));
    return add(total, low);
  }
#endif
}

// The sums of 16 vectors' lanes as one vector, added in the same order as sum().
static inline __m256 sum_each_of_8(const F32* rows) {
  __m256 four[4], two[2];
  for (int i = 0; i < 4; i++) {  // rows 2 i and 2 i + 1: 4 partial sums each
    const __m256 a = _mm256_add_ps(rows[2 * i].lo, rows[2 * i].hi);
    const __m256 b = _mm256_add_ps(rows[2 * i + 1].lo, rows[2 * i + 1].hi);
    four[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  for (int i = 0; i < 2; i++) {  // in half h: rows 4 i + h (two lanes), then 4 i + 2 + h
    const __m256 a = four[2 * i], b = four[2 * i + 1];
    two[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
  const __m256 one = _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x88), _mm256_shuffle_ps(two[0], two[1], 0xdd));
  return _mm256_permutevar8x32_ps(one, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
static inline F32 sum_each(const F32* rows) { return {sum_each_of_8(rows), sum_each_of_8(rows + 8)}; }

static inline void transpose(F32* rows) {
  float lanes[16][16];
  for (int i = 0; i < 16; i++) store(lanes[i], rows[i]);
  for (int i = 0; i < 16; i++) {
    float column[16];
    for (int j = 0; j < 16; j++) column[j] = lanes[j][i];
    rows[i] = load(column);
  }
}

static inline void pause() { _mm_pause(); }

}  // namespace AQ_NAMESPACE
