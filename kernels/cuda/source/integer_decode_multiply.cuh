// How a warp of integer_decode.cu multiplies what is in its ring.
#pragma once

#include "code_table.cuh"
#include "integer_decode_shape.cuh"
#include "integer_dequantize.cuh"
#include "ptx/warp_matrix.cuh"

// Whether codes become numbers around zero, which offsets then have to undo; minima of super-blocks take codes as they are.
constexpr bool kCentered = ZERO_KIND == 0 || (ZERO_KIND == 2 && !kSupers);

// Products of e2m1 numbers and e4m3 scales are exact in the inputs' type: less work than to scale the products of a group
// where these are of more than one tile of tokens.
#ifndef SCALED_CODES
#define SCALED_CODES (TOKEN_TILES > 1)
#endif
constexpr bool kScaledCodes = SCALE_TYPE == kScaleE4M3 && HAS_CODE_TABLE && !kRowScales && SCALED_CODES;
constexpr bool kScaledSums = !kRowScales && !kScaledCodes;

using Sums = float[PART_TILES][TOKEN_TILES][4];

// Scales and zero points of one group for a lane's rows: row half `i % 2` of tile `i / 2`.
struct Group {
    float scales[PART_TILES * 2];
    float offsets[PART_TILES * 2];
    ZeroPair<CODE_BITS, kBf16> zeros[PART_TILES];
    uint32_t pairs[PART_TILES * 2];  // with kScaledCodes: scales in the inputs' type, each twice
};

// e4m3 scales of the lane's rows, from their bytes.
__device__ __forceinline__ void load_pairs(const uint8_t* line, uint32_t (&pairs)[PART_TILES * 2]) {
    constexpr uint32_t kUnbias = kBf16 ? 0x7B807B80u : 0x5C005C00u, kNegativeZero = 0x80008000u;  // 2^120 or 2^8, twice
#pragma unroll
    for (int tile = 0; tile < PART_TILES; ++tile) {
        const uint32_t word = reinterpret_cast<const uint32_t*>(line)[tile / 2];
        const uint32_t both =
            fused_multiply_add_pair<kBf16>(widen_e4m3_pair<kBf16>(word, tile % 2), kUnbias, kNegativeZero);
        pairs[tile * 2] = __byte_perm(both, 0, 0x1010);
        pairs[tile * 2 + 1] = __byte_perm(both, 0, 0x3232);
    }
}

// Scales (KIND 0) or offsets (1), which begin at `lines`. `first` is the place of the lane's values in a line of 64.
template <int KIND>
__device__ __forceinline__ void load_scales(const uint8_t* slot, const uint8_t* lines, int group, int first,
                                            float (&values)[PART_TILES * 2]) {
    const uint8_t* const line = lines + (group * 64 + first) * kScaleSize;
    if constexpr (kSupers) {
        load_supers(line, slot + kStageBytes - kSuperBytes + (KIND * 64 + first) * 2, values);
    } else {
        load_stored<SCALE_TYPE>(line, values);
    }
}

__device__ __forceinline__ void load_group(const uint8_t* slot, int group, int first, Group& values) {
    if (kRowScales) return;
    if constexpr (kScaledCodes) return load_pairs(slot + kCodeBytes + group * 64 + first, values.pairs);
    load_scales<0>(slot, slot + kCodeBytes, group, first, values.scales);
    const uint8_t* zeros = slot + kCodeBytes + kScaleBytes;
    if (ZERO_KIND == 1) {
#pragma unroll
        for (int pair = 0; pair < PART_TILES / 2; ++pair) {
            const uint32_t bytes = *reinterpret_cast<const uint32_t*>(zeros + group * 64 + first + pair * 4);
#pragma unroll
            for (int i = 0; i < 4; ++i) values.zeros[pair * 2 + i / 2].set(i % 2, bytes >> (i * 8) & 0xFF);
        }
    } else if (ZERO_KIND == 2) {
        load_scales<1>(slot, zeros, group, first, values.offsets);
#pragma unroll
        for (int i = 0; i < PART_TILES * 2; ++i) {
            if (kCentered) values.offsets[i] += values.scales[i] * static_cast<float>(1 << (CODE_BITS - 1));
            if (kSupers) values.offsets[i] = -values.offsets[i];
            if (!kCentered) values.zeros[i / 2].set(i % 2, 0);
        }
    }
}

// What a warp has at hand within a unit.
struct Registers {
    LaneCodes<CODE_BITS> codes[PART_TILES];  // of a chunk, by tile
    uint32_t inputs[TOKEN_TILES][4];     // B fragments of two k16-steps
    float products[PART_TILES][TOKEN_TILES][4];  // of a group, by tile
    float input_sums[TOKEN_TILES][4];    // of x over a group, in every row
    Group group;
};

__device__ __forceinline__ void clear_products(Registers& at) {
#pragma unroll
    for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            at.input_sums[token_tile][i] = 0.0f;
#pragma unroll
            for (int tile = 0; tile < PART_TILES; ++tile) at.products[tile][token_tile][i] = 0.0f;
        }
    }
}

__device__ __forceinline__ void add_products(const Registers& at, Sums& sums) {
#pragma unroll
    for (int tile = 0; tile < PART_TILES; ++tile) {
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& sum = sums[tile][token_tile][i];
                const int row = tile * 2 + i / 2;
                sum += at.group.scales[row] * at.products[tile][token_tile][i];
                if (ZERO_KIND == 2) sum += at.group.offsets[row] * at.input_sums[token_tile][i];
            }
        }
    }
}

// k16-step STEP of a unit and those after it. `input` is this lane's row of its first columns, for ldmatrix.
template <int STEP>
__device__ __forceinline__ void multiply_steps(const uint8_t* slot, const uint8_t* const (&input)[TOKEN_TILES], int lane,
                                               int first, Registers& at, Sums& sums) {
    if constexpr (STEP % 4 == 0) {
#pragma unroll
        for (int tile = 0; tile < PART_TILES; ++tile) {
            at.codes[tile] = load_codes<CODE_BITS>(slot + STEP / 4 * kPieceBytes + tile * kTileBytes, lane);
        }
    }
    if constexpr (STEP % 2 == 0) {
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            load_matrices<false>(at.inputs[token_tile], input[token_tile] + STEP * 32);
        }
    }
    if constexpr (STEP % kGroupSteps == 0) {
        load_group(slot, STEP / kGroupSteps, first, at.group);
        clear_products(at);
    }
#pragma unroll
    for (int tile = 0; tile < PART_TILES; ++tile) {
        uint32_t fragment[4];
#if HAS_CODE_TABLE
        look_up<STEP % 4>(at.codes[tile], fragment);
        if constexpr (kScaledCodes) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                fragment[r] = fused_multiply_add_pair<kBf16>(fragment[r], at.group.pairs[tile * 2 + r % 2], 0x80008000u);
            }
        }
#else
        dequantize<CODE_BITS, kBf16, kCentered, STEP % 4>(at.codes[tile], at.group.zeros[tile], fragment);
#endif
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            float(&target)[4] = kScaledSums ? at.products[tile][token_tile] : sums[tile][token_tile];
            multiply_add<kBf16>(target, fragment, at.inputs[token_tile][STEP % 2 * 2],
                                at.inputs[token_tile][STEP % 2 * 2 + 1]);
        }
    }
    if constexpr (ZERO_KIND == 2) {  // sums of x as a product with ones: in the places where the offsets need them
        constexpr uint32_t kOne = PairConstants<kBf16>::kOne;
        const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            multiply_add<kBf16>(at.input_sums[token_tile], ones, at.inputs[token_tile][STEP % 2 * 2],
                                at.inputs[token_tile][STEP % 2 * 2 + 1]);
        }
    }
    if constexpr ((STEP + 1) % kGroupSteps == 0 && kScaledSums) add_products(at, sums);
    if constexpr (STEP + 1 < UNIT_CHUNKS * 4) multiply_steps<STEP + 1>(slot, input, lane, first, at, sums);
}

// Adds one unit's product to the sums. `input` is the unit's first column of token 0.
__device__ __forceinline__ void multiply_unit(const uint8_t* slot, const uint8_t* input, int num_tokens, int lane,
                                              int part, Sums& sums) {
    const uint8_t* rows[TOKEN_TILES];
#pragma unroll
    for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
        const int token = min(token_tile * 8 + lane % 8, num_tokens - 1);  // what stands in unused columns is dropped
        rows[token_tile] = input + token * kInputStride + lane / 8 * 16;
    }
    Registers at;
    multiply_steps<0>(slot, rows, lane, lane / 4 * 8 + part % (4 / PART_TILES) * (PART_TILES * 2), at, sums);
}
