// Scales as they are stored, and what they are as float32.
#pragma once

#include <cuda_fp16.h>

#include "types.cuh"

// The values of SCALE_TYPE.
constexpr int kScaleHalf = 0, kScaleBfloat = 1, kScaleFloat = 2;
constexpr int kScaleE8M0 = 3;   // powers of two; neither 0 (2^-127) nor 255 (NaN) occurs
constexpr int kScaleE4M3 = 4;   // FP8 without NaN and without negative numbers
constexpr int kScaleSuper = 5;  // int8, to be multiplied by the fp16 number of 256 columns

__device__ constexpr int stored_bytes(int type) { return type == kScaleFloat ? 4 : type == kScaleHalf || type == kScaleBfloat ? 2 : 1; }

// Two e4m3 numbers, in the bytes 2 `pair` and 2 `pair` + 1 of a word, in bf16 (or fp16) but for a factor of 2^-120 (2^-8). The exponent's and the
// mantissa's bits are those of the wider type, subnormals included.
template <bool IS_BF16>
__device__ __forceinline__ uint32_t widen_e4m3_pair(uint32_t word, int pair = 0) {
    const uint32_t high = __byte_perm(word, 0, 0x1404 + pair * 0x2020);
    return IS_BF16 ? high >> 4 & 0x07F007F0u : high >> 1 & 0x3F803F80u;
}

// Byte `index` of a word of int8 numbers, times `super`, which has 11 bits: exact. 2^15 + 128 + number stands in the bits
// of a float, and the product of the first two, which has 20 bits, is taken off again.
__device__ __forceinline__ float super_number(uint32_t word, int index, float super) {
    const float number = __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x47000000u, 0x7404 + index * 16));
    return fmaf(number, super, super * -32896.0f);
}

// Byte `index` of a word of stored scales of one byte.
template <int TYPE>
__device__ __forceinline__ float stored_number(uint32_t word, int index) {
    if (TYPE == kScaleE8M0) {
        const uint32_t moved = index == 3 ? word >> 1 : word << (23 - 8 * index);
        return __uint_as_float(moved & 0x7F800000u);
    }
    if (TYPE == kScaleE4M3) {
        const uint32_t moved = index == 3 ? word >> 4 : word << (20 - 8 * index);
        return __uint_as_float(moved & 0x07F00000u) * 0x1p120f;
    }
    return super_number(word, index, 1.0f);
}

// COUNT (4 or 8) stored values of one or two bytes in a row.
template <int TYPE, int COUNT>
__device__ __forceinline__ void load_small(const uint8_t* line, float (&values)[COUNT]) {
    constexpr int kWords = COUNT * stored_bytes(TYPE) / 4;
    uint32_t words[kWords];
    if constexpr (kWords == 4) {
        const uint4 packed = *reinterpret_cast<const uint4*>(line);
        words[0] = packed.x, words[1] = packed.y, words[2] = packed.z, words[3] = packed.w;
    } else if constexpr (kWords == 2) {
        const uint2 packed = *reinterpret_cast<const uint2*>(line);
        words[0] = packed.x, words[1] = packed.y;
    } else if constexpr (kWords == 1) {
        words[0] = *reinterpret_cast<const uint32_t*>(line);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        if constexpr (TYPE == kScaleBfloat) {
            values[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000u);
        } else if constexpr (TYPE == kScaleHalf) {
            values[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)));
        } else {
            values[i] = stored_number<TYPE>(words[i / 4], i % 4);
        }
    }
}

// COUNT (4 or 8) stored values in a row.
template <int TYPE, int COUNT>
__device__ __forceinline__ void load_stored(const uint8_t* line, float (&values)[COUNT]) {
    static_assert(COUNT == 4 || COUNT == 8, "two for each tile of a lane");
    if constexpr (TYPE == kScaleFloat) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(line + i * 4);
            values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
        }
    } else {
        load_small<TYPE>(line, values);
    }
}

// COUNT (4 or 8) int8 numbers in a row, each times its fp16 super.
template <int COUNT>
__device__ __forceinline__ void load_supers(const uint8_t* line, const uint8_t* supers, float (&values)[COUNT]) {
    float factors[COUNT];
    load_stored<kScaleHalf>(supers, factors);
    uint32_t words[COUNT / 4];
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) words[i] = reinterpret_cast<const uint32_t*>(line)[i];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = super_number(words[i / 4], i % 4, factors[i]);
}
