// FP8 e4m3 codes, packed as 8-bit integers are (integer/packing.py), to the A fragments of matrix instructions.
//
// Shifted into place, a code's exponent and mantissa are those of a bf16 or fp16 number, subnormals included, but for the
// bias of the exponent: a product with a power of two mends it, exactly. NaN codes come out as 480: their rows have NaN
// scales instead.
#pragma once

#include "integer_dequantize.cuh"
#include "ptx/packed_math.cuh"

template <bool IS_BF16, int STEP>
__device__ __forceinline__ void dequantize_float8(const LaneCodes<8>& codes, uint32_t (&fragment)[4]) {
    constexpr int kPlace = IS_BF16 ? 4 : 7;                              // bits from a code to where its number has it
    constexpr uint32_t kUnbias = IS_BF16 ? 0x7B807B80u : 0x5C005C00u;  // 2^120 or 2^8, twice
    constexpr uint32_t kNegativeZero = 0x80008000u;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const uint32_t word = codes.words[STEP * 2 + r / 2];
        const uint32_t sign = (r % 2 == 0 ? word << 8 : word) & kNegativeZero;
        const uint32_t moved = r % 2 == 0 ? word << kPlace : word >> (8 - kPlace);
        const uint32_t number = mask_and_set(moved, 0x007F007Fu << kPlace, sign);
        fragment[r] = fused_multiply_add_pair<IS_BF16>(number, kUnbias, kNegativeZero);
    }
}
