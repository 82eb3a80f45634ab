// Packed weights in shared memory to scaled fragments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "code_table.cuh"
#include "float8_dequantize.cuh"
#include "integer_dequantize.cuh"
#include "integer_stage.cuh"

constexpr bool kIsBfloat = BFLOAT;
// Whether the type of the inputs holds scales exactly.
constexpr bool kScalesFit = SCALE_TYPE == (BFLOAT ? kScaleBfloat : kScaleHalf) || SCALE_TYPE == kScaleE4M3 ||
                            (BFLOAT && SCALE_TYPE == kScaleE8M0);

__device__ __forceinline__ float number_of(uint32_t bits16) {
    const uint16_t bits = static_cast<uint16_t>(bits16);
    return SCALE_TYPE == 1 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

// `value` rounded to the type of the inputs, twice, and what the rounding took away.
__device__ __forceinline__ uint32_t round_pair(float value, float& rest) {
    uint32_t bits;
    if (kIsBfloat) {
        const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
        rest = value - __bfloat162float(rounded);
        bits = __bfloat16_as_ushort(rounded);
    } else {
        const __half rounded = __float2half_rn(value);
        rest = value - __half2float(rounded);
        bits = __half_as_ushort(rounded);
    }
    return bits | bits << 16;
}

__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
    constexpr uint32_t kNegativeZero = 0x80008000u;
    return fused_multiply_add_pair<kIsBfloat>(a, b, kNegativeZero);
}

// The two rows' values of one group, each twice in a word. A value that the type of the inputs cannot hold comes as a
// rounded number and the rest.
struct PairValue {
    uint32_t rounded[2];
    uint32_t rest[2];

    // `values`: the group's line in shared memory; `place`: of this lane's first row in it; `supers`: what they are
    // multiplied by, if anything.
    __device__ __forceinline__ void load(const uint8_t* values, int place, float factor, const uint8_t* supers) {
        if (SCALE_TYPE == kScaleE8M0 && kScalesFit) {
            const uint32_t both = *reinterpret_cast<const uint16_t*>(values + place);
            rounded[0] = __byte_perm(both, 0, 0x4040) << 7;
            rounded[1] = __byte_perm(both, 0, 0x4141) << 7;
            return;
        }
        if (SCALE_TYPE == kScaleE4M3) {
            const uint32_t both = *reinterpret_cast<const uint16_t*>(values + place);
            const uint32_t pair = multiply_pair(widen_e4m3_pair<kIsBfloat>(both), kIsBfloat ? 0x7B807B80u : 0x5C005C00u);
            rounded[0] = __byte_perm(pair, 0, 0x1010);
            rounded[1] = __byte_perm(pair, 0, 0x3232);
            return;
        }
        if (kScalesFit) {
            const uint32_t both = *reinterpret_cast<const uint32_t*>(values + place * 2);
            rounded[0] = __byte_perm(both, 0, 0x1010);
            rounded[1] = __byte_perm(both, 0, 0x3232);
            return;
        }
        float exact[2];
        if (SCALE_TYPE == 2) {
            const float2 both = *reinterpret_cast<const float2*>(values + place * 4);
            exact[0] = both.x, exact[1] = both.y;
        } else if (kScaleBytes == 1) {
            const uint32_t both = *reinterpret_cast<const uint16_t*>(values + place);
            exact[0] = stored_number<SCALE_TYPE>(both, 0), exact[1] = stored_number<SCALE_TYPE>(both, 1);
            if (kSupers) {
                const __half2 super = *reinterpret_cast<const __half2*>(supers + place * 2);
                exact[0] *= __low2float(super), exact[1] *= __high2float(super);
            }
        } else {
            const uint32_t both = *reinterpret_cast<const uint32_t*>(values + place * 2);
            exact[0] = number_of(both & 0xFFFF), exact[1] = number_of(both >> 16);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float left, nothing;
            rounded[half] = round_pair(exact[half] * factor, left);
            rest[half] = round_pair(left, nothing);
        }
    }
};

// What a lane needs of one group for one tile of 64 rows.
struct GroupValues {
    PairValue scale;
    PairValue offset;
    ZeroPair<CODE_BITS, kIsBfloat> zeros;

    __device__ __forceinline__ void load(const uint8_t* weights, int group, int place, float factor) {
        const uint8_t* const supers = weights + kSuperStart;
        if (GROUP != 0) scale.load(weights + kCodeBytes + group * 64 * kScaleBytes, place, factor, supers);
        if (ZEROS == 1) {
            const uint8_t* line = weights + kCodeBytes + kScaleStage + group * 64;
            const uint32_t both = *reinterpret_cast<const uint16_t*>(line + place);
            zeros.set(0, both & 0xFF);
            zeros.set(1, both >> 8);
        }
        if (ZEROS == 2) {
            zeros.set(0, 0);
            zeros.set(1, 0);
            offset.load(weights + kCodeBytes + kScaleStage + kZeroStage + group * 64 * kScaleBytes, place,
                        kSupers ? -factor : factor, supers + 128);
        }
    }

    __device__ __forceinline__ void apply(uint32_t (&fragment)[4]) const {
#pragma unroll
        for (int r = 0; r < (GROUP == 0 ? 0 : 4); ++r) {
            const int half = r % 2;
            const uint32_t code = fragment[r];
            if (kScalesFit && ZEROS != 2) {
                fragment[r] = multiply_pair(code, scale.rounded[half]);
                continue;
            }
            // Smallest terms first, so that only the last rounding counts.
            uint32_t sum = ZEROS == 2 && !kScalesFit ? offset.rest[half] : 0;
            if (!kScalesFit) {
                sum = ZEROS == 2 ? fused_multiply_add_pair<kIsBfloat>(code, scale.rest[half], sum)
                                 : multiply_pair(code, scale.rest[half]);
            }
            if (ZEROS == 2) {
                const uint32_t offsets = offset.rounded[half];
                sum = kScalesFit ? offsets : fused_multiply_add_pair<kIsBfloat>(offsets, PairConstants<kIsBfloat>::kOne, sum);
            }
            fragment[r] = fused_multiply_add_pair<kIsBfloat>(code, scale.rounded[half], sum);
        }
    }
};

// The fragment of k16-step STEP of a tile of 16 rows.
template <int STEP>
__device__ __forceinline__ void make_fragment(const LaneCodes<CODE_BITS>& codes, const GroupValues& values,
                                              uint32_t (&fragment)[4]) {
#if HAS_CODE_TABLE
    look_up<STEP>(codes, fragment);
#elif CODE_FLOAT8
    dequantize_float8<kIsBfloat, STEP>(codes, fragment);
#else
    dequantize<CODE_BITS, kIsBfloat, ZEROS == 0, STEP>(codes, values.zeros, fragment);
#endif
    values.apply(fragment);
}

// Whether sums must still be multiplied by `row_factor`.
constexpr bool kScalesSums = GROUP == 0 || !kScalesFit || HAS_CODE_TABLE;

// The factor of a row: of all outputs, and its scale where a row has one.
// `before`: super rows of other weights in front of the row's own.
__device__ __forceinline__ float row_factor(const PackedWeights& weights, int row, int rows, int64_t before = 0) {
    if (GROUP != 0) return weights.output_factor;
    if (row >= rows) return 0.0f;
    const int64_t place = before * 64 + row / 64 * 64 + row % 8 * 8 + row % 64 / 16 * 2 + row % 16 / 8;
    if (SCALE_TYPE == kScaleFloat) return reinterpret_cast<const float*>(weights.scales)[place] * weights.output_factor;
    if (kScaleBytes == 1) return stored_number<SCALE_TYPE>(weights.scales[place], 0) * weights.output_factor;
    return number_of(reinterpret_cast<const uint16_t*>(weights.scales)[place]) * weights.output_factor;
}
