// Scales as they are stored, and what they are as float32.
#pragma once

#include <cuda_fp16.h>

#include "types.cuh"

// The values of SCALE_TYPE.
constexpr int kScaleHalf = 0, kScaleBfloat = 1, kScaleFloat = 2;
constexpr int kScaleE8M0 = 3;   // powers of two; neither 0 (2^-127) nor 255 (NaN) occurs
constexpr int kScaleE4M3 = 4;   // FP8 without NaN
constexpr int kScaleSuper = 5;  // int8, to be multiplied by the fp16 number of 256 columns

__device__ constexpr int stored_bytes(int type) { return type == kScaleFloat ? 4 : type == kScaleHalf || type == kScaleBfloat ? 2 : 1; }

// Two e4m3 numbers in the low bytes of `both`, in bf16 (or fp16) but for a factor of 2^-120 (2^-8). The exponent's and the
// mantissa's bits are those of the wider type, subnormals included.
template <bool IS_BF16>
__device__ __forceinline__ uint32_t widen_e4m3_pair(uint32_t both) {
    const uint32_t high = __byte_perm(both, 0, 0x1404), sign = high & 0x80008000u;
    return IS_BF16 ? (high >> 4 & 0x07F007F0u) | sign : (high >> 1 & 0x3F803F80u) | sign;
}

// Byte `index` of a word of stored scales of one byte.
template <int TYPE>
__device__ __forceinline__ float stored_number(uint32_t word, int index) {
    if (TYPE == kScaleE8M0) {
        const uint32_t moved = index == 3 ? word >> 1 : word << (23 - 8 * index);
        return __uint_as_float(moved & 0x7F800000u);
    }
    if (TYPE == kScaleE4M3) {
        const uint32_t high = index == 3 ? word : word << (24 - 8 * index);
        return __uint_as_float((high & 0x80000000u) | (high >> 4 & 0x07F00000u)) * 0x1p120f;
    }
    // 2^23 + 128 + number, of which the first two are taken off.
    return __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4B000000u, 0x7440 + index)) - 8388736.0f;
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
