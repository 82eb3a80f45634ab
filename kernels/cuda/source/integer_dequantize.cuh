// Packed integer codes to the A fragments of matrix instructions. The bit layout is told in integer/packing.py.
//
// A 16-bit half of a word, shifted and masked, holds a code at bit OFFSET of the mantissa of 128 (bf16) or 1024 (fp16):
// with the exponent put in by the same LOP3 it is the number base + code * 2^OFFSET, and one fused multiply-add makes it
// code - zero, exactly. The zero point comes as `negated`: -(base / 2^OFFSET + zero) for each row half and OFFSET.
#pragma once

#include "ptx/packed_math.cuh"
#include "types.cuh"

template <bool IS_BF16>
struct PairConstants {
    static constexpr uint32_t kBase = IS_BF16 ? 0x43004300u : 0x64006400u;  // 128 or 1024, twice
    static constexpr uint32_t kOne = IS_BF16 ? 0x3F803F80u : 0x3C003C00u;
    static constexpr int kExponentOne = IS_BF16 ? 0x0080 : 0x0400;  // what doubles a number

    // 2^-OFFSET, twice.
    __device__ static constexpr uint32_t fraction(int offset) {
        return kOne - static_cast<uint32_t>(offset * kExponentOne) * 0x00010001u;
    }
    // -(base / 2^offset + zero), twice, for a zero point that fits the mantissa.
    __device__ static constexpr uint32_t negated(int offset, uint32_t zero) {
        return (0x80008000u | (kBase - static_cast<uint32_t>(offset * kExponentOne) * 0x00010001u)) +
               zero * (0x00010001u << offset);
    }
};

// The zero points of a lane's two rows of a tile, as the conversions want them.
template <int BITS, bool IS_BF16>
struct ZeroPair {
    // Mantissa offsets at which codes are found: 4 bits in bf16 at 0 only, in fp16 at 0 and 4; 2 and 3 bits at 0, 2, 4.
    // 5 and 6 bits at 0 only.
    static constexpr int kOffsets = BITS >= 5 ? 1 : BITS == 4 ? (IS_BF16 ? 1 : 2) : 3;
    static constexpr int kOffsetStep = BITS == 4 ? 4 : 2;
    uint32_t negated[2][kOffsets];

    __device__ __forceinline__ void set(int half, uint32_t zero) {
        if (BITS == 8 && IS_BF16) {  // 128 - zero, a whole number below 256: exact
            const uint32_t high = __float_as_uint(128.0f - static_cast<float>(zero)) >> 16;
            negated[half][0] = high | (high << 16);
        } else {
#pragma unroll
            for (int i = 0; i < kOffsets; ++i) {
                negated[half][i] = PairConstants<IS_BF16>::negated(i * kOffsetStep, zero);
            }
        }
    }
};

// Codes of one lane in one chunk of a tile.
template <int BITS>
struct LaneCodes;
template <>
struct LaneCodes<2> {
    uint32_t words[2];
};
template <>
struct LaneCodes<3> {
    uint32_t words[2];
    uint32_t high;
};
template <>
struct LaneCodes<4> {
    uint32_t words[4];
};
template <>
struct LaneCodes<5> {
    uint32_t words[4];
    uint32_t high;
};
template <>
struct LaneCodes<6> {
    uint32_t words[4];
    uint32_t high[2];
};
template <>
struct LaneCodes<8> {
    uint32_t words[8];
};

// Reads a lane's codes from a chunk's tile in shared memory (or global memory).
template <int BITS>
__device__ __forceinline__ LaneCodes<BITS> load_codes(const uint8_t* tile, int lane) {
    LaneCodes<BITS> codes;
    if constexpr (BITS == 2 || BITS == 3) {
        const uint2 low = reinterpret_cast<const uint2*>(tile)[lane];
        codes.words[0] = low.x, codes.words[1] = low.y;
        if constexpr (BITS == 3) codes.high = reinterpret_cast<const uint32_t*>(tile + 256)[lane];
    } else {
#pragma unroll
        for (int plane = 0; plane < BITS / 4; ++plane) {
            const uint4 words = reinterpret_cast<const uint4*>(tile)[plane * 32 + lane];
            codes.words[plane * 4] = words.x, codes.words[plane * 4 + 1] = words.y;
            codes.words[plane * 4 + 2] = words.z, codes.words[plane * 4 + 3] = words.w;
        }
        if constexpr (BITS == 5) codes.high = reinterpret_cast<const uint32_t*>(tile + 512)[lane];
        if constexpr (BITS == 6) {
            const uint2 high = reinterpret_cast<const uint2*>(tile + 512)[lane];
            codes.high[0] = high.x, codes.high[1] = high.y;
        }
    }
    return codes;
}

// The A fragment of k16-step STEP: codes minus zero points (SYMMETRIC: minus 2^(BITS - 1), `zeros` is not read).
template <int BITS, bool IS_BF16, bool SYMMETRIC, int STEP>
__device__ __forceinline__ void dequantize(const LaneCodes<BITS>& codes, const ZeroPair<BITS, IS_BF16>& zeros,
                                           uint32_t (&fragment)[4]) {
    using Constants = PairConstants<IS_BF16>;
    constexpr uint32_t kMiddle = 1u << (BITS - 1);
    if constexpr (BITS == 8 && IS_BF16) {
        // The mantissa has 7 bits: base + low bits, plus -256 or (with the high bit) -128.
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const uint32_t word = codes.words[STEP * 2 + r / 2] >> (r % 2 * 8);
            const uint32_t low = mask_and_set(word, 0x007F007Fu, Constants::kBase);
            const uint32_t high = mask_and_set<true>(word, 0x00800080u, 0xC380C380u);
            fragment[r] = fused_multiply_add_pair<IS_BF16>(low, Constants::kOne, high);
            if (!SYMMETRIC) {
                fragment[r] = fused_multiply_add_pair<IS_BF16>(fragment[r], Constants::kOne, zeros.negated[r % 2][0]);
            }
        }
    } else if constexpr (BITS == 8) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const uint32_t word = codes.words[STEP * 2 + r / 2] >> (r % 2 * 8);
            const uint32_t number = mask_and_set(word, 0x00FF00FFu, Constants::kBase);
            const uint32_t negated = SYMMETRIC ? Constants::negated(0, kMiddle) : zeros.negated[r % 2][0];
            fragment[r] = fused_multiply_add_pair<IS_BF16>(number, Constants::kOne, negated);
        }
    } else if constexpr (BITS == 4) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int offset = IS_BF16 ? 0 : r % 2 * 4;
            const uint32_t word = codes.words[STEP] >> (r * 4 - offset);
            const uint32_t number = mask_and_set(word, 0x000F000Fu << offset, Constants::kBase);
            const uint32_t negated =
                SYMMETRIC ? Constants::negated(offset, kMiddle) : zeros.negated[r % 2][IS_BF16 ? 0 : r % 2];
            fragment[r] = fused_multiply_add_pair<IS_BF16>(number, Constants::fraction(offset), negated);
        }
    } else if constexpr (BITS == 5 || BITS == 6) {
        constexpr int kWord = STEP / 2;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            // From where the bits above the low four are to bit 4.
            const int shift = 2 * (STEP % 2 * 4 + r) + (BITS == 5 ? kWord : 0) - 4;
            uint32_t high;
            if constexpr (BITS == 5) high = codes.high;
            if constexpr (BITS == 6) high = codes.high[kWord];
            high = shift < 0 ? high << -shift : high >> shift;
            const uint32_t low = mask_and_set(codes.words[STEP] >> (r * 4), 0x000F000Fu, Constants::kBase);
            const uint32_t number = mask_and_set(high, BITS == 5 ? 0x00100010u : 0x00300030u, low);
            const uint32_t negated = SYMMETRIC ? Constants::negated(0, kMiddle) : zeros.negated[r % 2][0];
            fragment[r] = fused_multiply_add_pair<IS_BF16>(number, Constants::kOne, negated);
        }
    } else {
        constexpr int kWord = STEP / 2;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int pair = STEP % 2 * 4 + r, window = pair / 3, place = pair % 3, offset = 2 * place;
            uint32_t number = mask_and_set(codes.words[kWord] >> (6 * window), 0x00030003u << offset, Constants::kBase);
            if constexpr (BITS == 3) {
                const int shift = 6 * window + kWord - 2;  // brings the high bit of the code above its two low ones
                const uint32_t high = shift < 0 ? codes.high << -shift : codes.high >> shift;
                number = mask_and_set(high, 0x00040004u << offset, number);
            }
            const uint32_t negated = SYMMETRIC ? Constants::negated(offset, kMiddle) : zeros.negated[r % 2][place];
            fragment[r] = fused_multiply_add_pair<IS_BF16>(number, Constants::fraction(offset), negated);
        }
    }
}
