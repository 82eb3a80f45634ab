// Packed weights in shared memory to scaled fragments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "code_table.cuh"
#include "float8_dequantize.cuh"
#include "integer_dequantize.cuh"
#include "integer_stage.cuh"

#ifndef SUM_GROUPS
#define SUM_GROUPS 0  // fragments are codes minus zero points; scales are for the sums of a group
#endif
static_assert(!SUM_GROUPS || (GROUP >= 64 && ZEROS != 2 && !kSupers), "a group ends with a chunk, and its scales are all");

constexpr bool kIsBfloat = BFLOAT;
constexpr bool kScalesCodes = GROUP != 0 && !SUM_GROUPS;
// Whether the type of the inputs holds scales exactly.
constexpr bool kScalesFit = SCALE_TYPE == (BFLOAT ? kScaleBfloat : kScaleHalf) || SCALE_TYPE == kScaleE4M3 ||
                            (BFLOAT && SCALE_TYPE == kScaleE8M0);

__device__ __forceinline__ float number_of(uint32_t bits16) {
    const uint16_t bits = static_cast<uint16_t>(bits16);
    return SCALE_TYPE == 1 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

// Two numbers rounded to the type of the inputs.
__device__ __forceinline__ uint32_t round_both(float low, float high) {
    if (kIsBfloat) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// What rounding took from them.
__device__ __forceinline__ uint32_t round_rests(float low, float high, uint32_t rounded) {
    if (kIsBfloat) {
        return round_both(low - __uint_as_float(rounded << 16), high - __uint_as_float(rounded & 0xFFFF0000u));
    }
    const __half2 pair = *reinterpret_cast<const __half2*>(&rounded);
    return round_both(low - __low2float(pair), high - __high2float(pair));
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

    __device__ __forceinline__ void set_rounded(uint32_t both) {
        rounded[0] = __byte_perm(both, 0, 0x1010);
        rounded[1] = __byte_perm(both, 0, 0x3232);
    }

    __device__ __forceinline__ void set_rest(uint32_t both) {
        rest[0] = __byte_perm(both, 0, 0x1010);
        rest[1] = __byte_perm(both, 0, 0x3232);
    }

    __device__ __forceinline__ void set(float first, float second) {
        const uint32_t both = round_both(first, second);
        set_rounded(both);
        set_rest(round_rests(first, second, both));
    }

    // `values`: the group's line in shared memory; `place`: of this lane's first row in it.
    __device__ __forceinline__ void load(const uint8_t* values, int place, float factor) {
        if (SCALE_TYPE == kScaleE8M0 && kScalesFit) {
            const uint32_t both = *reinterpret_cast<const uint16_t*>(values + place);
            rounded[0] = __byte_perm(both, 0, 0x4040) << 7;
            rounded[1] = __byte_perm(both, 0, 0x4141) << 7;
            return;
        }
        if (SCALE_TYPE == kScaleE4M3) {
            const uint32_t both = *reinterpret_cast<const uint16_t*>(values + place);
            set_rounded(multiply_pair(widen_e4m3_pair<kIsBfloat>(both), kIsBfloat ? 0x7B807B80u : 0x5C005C00u));
            return;
        }
        if (kScalesFit) {
            set_rounded(*reinterpret_cast<const uint32_t*>(values + place * 2));
            return;
        }
        float exact[2];
        load_exact(values, place, factor, exact);
        set(exact[0], exact[1]);
    }

    __device__ __forceinline__ static void load_exact(const uint8_t* values, int place, float factor, float (&exact)[2]) {
        if (SCALE_TYPE == 2) {
            const float2 both = *reinterpret_cast<const float2*>(values + place * 4);
            exact[0] = both.x, exact[1] = both.y;
        } else if (kScaleBytes == 1) {
            const uint32_t both = *reinterpret_cast<const uint16_t*>(values + place);
            exact[0] = stored_number<SCALE_TYPE>(both, 0), exact[1] = stored_number<SCALE_TYPE>(both, 1);
        } else {
            const uint32_t both = *reinterpret_cast<const uint32_t*>(values + place * 2);
            exact[0] = number_of(both & 0xFFFF), exact[1] = number_of(both >> 16);
        }
        exact[0] *= factor, exact[1] *= factor;
    }
};

constexpr int kShared = kSupers ? kGroupsPerChunk : 1;

// What a lane needs of one group for one tile of 64 rows.
struct GroupValues {
    PairValue scale;
    PairValue offset;
    ZeroPair<CODE_BITS, kIsBfloat> zeros;
    uint32_t own[4];  // of super-blocks: two rows' scales of this lane's group, their rests, offsets, and zero points

    __device__ __forceinline__ void load(const uint8_t* weights, int group, int place, float factor) {
        if (kSupers) return load_super(weights, group, place, factor);
        if (kScalesCodes) scale.load(weights + kCodeBytes + group * 64 * kScaleBytes, place, factor);
        if (ZEROS == 1) {
            const uint8_t* line = weights + kCodeBytes + kScaleStage + group * 64;
            const uint32_t both = *reinterpret_cast<const uint16_t*>(line + place);
            zeros.set(0, both & 0xFF);
            zeros.set(1, both >> 8);
        }
        if (ZEROS == 2) load_offsets(weights, group, place, factor);
    }

    __device__ __forceinline__ void load_offsets(const uint8_t* weights, int group, int place, float factor) {
        const uint8_t* const line = weights + kCodeBytes + kScaleStage + kZeroStage + group * 64 * kScaleBytes;
        if (kScalesFit) {
            zeros.set(0, 0);
            zeros.set(1, 0);
            return offset.load(line, place, factor);
        }
        float scales[2], offsets[2];
        PairValue::load_exact(weights + kCodeBytes + group * 64 * kScaleBytes, place, factor, scales);
        PairValue::load_exact(line, place, factor, offsets);
        zeros.set(0, take_zero(scales[0], offsets[0]));
        zeros.set(1, take_zero(scales[1], offsets[1]));
        offset.set_rounded(round_both(offsets[0], offsets[1]));
    }

    // The zero point nearest to an offset. What it leaves of the offset is small, and its rounding counts for nothing.
    __device__ __forceinline__ static uint32_t take_zero(float scale, float& offset) {
        constexpr float kLargest = CODE_BITS == 8 ? 255 : 1 << CODE_BITS, kWhole = 8388608.0f;
        const float zero = fminf(fmaxf(__fdividef(-offset, scale), 0.0f), kLargest) + kWhole;  // now a whole number
        offset = fmaf(zero - kWhole, scale, offset);
        return __float_as_uint(zero) & 0x1FF;
    }

    // Of super-blocks. The four lanes that hold the same rows make the values of one group each, for all of a chunk.
    __device__ __forceinline__ void load_super(const uint8_t* weights, int group, int place, float factor) {
        const int lane = threadIdx.x % 32, index = group % kShared, source = lane / 4 * 4 + index;
        if (index == 0) convert_super(weights, group + lane % kShared, place, factor);
        scale.set_rounded(__shfl_sync(0xFFFFFFFFu, own[0], source));
        scale.set_rest(__shfl_sync(0xFFFFFFFFu, own[1], source));
        if (ZEROS != 2) return;
        offset.set_rounded(__shfl_sync(0xFFFFFFFFu, own[2], source));
        const uint32_t both = __shfl_sync(0xFFFFFFFFu, own[3], source);
        zeros.set(0, both & 0xFFFF);
        zeros.set(1, both >> 16);
    }

    __device__ __forceinline__ void convert_super(const uint8_t* weights, int group, int place, float factor) {
        float scales[2], minima[2];
        load_pair(weights + kCodeBytes + group * 64, weights + kSuperStart, place, scales);
        scales[0] *= factor, scales[1] *= factor;
        own[0] = round_both(scales[0], scales[1]);
        own[1] = round_rests(scales[0], scales[1], own[0]);
        if (ZEROS != 2) return;
        load_pair(weights + kCodeBytes + kScaleStage + group * 64, weights + kSuperStart + 128, place, minima);
        float offsets[2] = {minima[0] * -factor, minima[1] * -factor};
        own[3] = take_zero(scales[0], offsets[0]);
        own[3] |= take_zero(scales[1], offsets[1]) << 16;
        own[2] = round_both(offsets[0], offsets[1]);
    }

    __device__ __forceinline__ static void load_pair(const uint8_t* line, const uint8_t* supers, int place,
                                                     float (&values)[2]) {
        const uint32_t both = *reinterpret_cast<const uint16_t*>(line + place);
        const __half2 super = *reinterpret_cast<const __half2*>(supers + place * 2);
        values[0] = super_number(both, 0, __low2float(super)), values[1] = super_number(both, 1, __high2float(super));
    }

    __device__ __forceinline__ void apply(uint32_t (&fragment)[4]) const {
#pragma unroll
        for (int r = 0; r < (kScalesCodes ? 4 : 0); ++r) {
            const int half = r % 2;
            const uint32_t code = fragment[r];
            if (kScalesFit) {
                fragment[r] = ZEROS == 2
                                  ? fused_multiply_add_pair<kIsBfloat>(code, scale.rounded[half], offset.rounded[half])
                                  : multiply_pair(code, scale.rounded[half]);
                continue;
            }
            // Smallest terms first, so that only the last rounding counts.
            const uint32_t sum = ZEROS == 2
                                     ? fused_multiply_add_pair<kIsBfloat>(code, scale.rest[half], offset.rounded[half])
                                     : multiply_pair(code, scale.rest[half]);
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
