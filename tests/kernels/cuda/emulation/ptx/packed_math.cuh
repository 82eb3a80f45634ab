// Emulated: arithmetic on words that hold two 16-bit numbers.
#pragma once

template <bool IS_BF16>
inline float packed_number(unsigned word, int half) {
  const unsigned short bits = static_cast<unsigned short>(word >> 16 * half);
  if (IS_BF16) return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
  return __half2float(__half(__half_raw{bits}));
}

template <bool IS_BF16>
inline unsigned fused_multiply_add_pair(unsigned a, unsigned b, unsigned c) {
  unsigned result = 0;
  for (int half = 0; half < 2; ++half) {
    const double exact = double(packed_number<IS_BF16>(a, half)) * packed_number<IS_BF16>(b, half) +
                         packed_number<IS_BF16>(c, half);
    unsigned short bits;
    if (IS_BF16) {
      const __nv_bfloat16_raw raw = __nv_bfloat16(__double2bfloat16(exact));
      bits = raw.x;
    } else {
      const __half_raw raw = __half(__double2half(exact));
      bits = raw.x;
    }
    result |= unsigned(bits) << 16 * half;
  }
  return result;
}

template <bool XOR = false>
inline unsigned mask_and_set(unsigned word, unsigned mask, unsigned bits) {
  return XOR ? (word & mask) ^ bits : (word & mask) | bits;
}
