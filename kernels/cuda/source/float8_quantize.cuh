// A row of activations to FP8 e4m3 codes.
//
// Macros: ELEMENT_IS_BF16; MODE (0: a scale for the row, by one block; 1: for each 128 columns, by 16 threads each; 2: a
// given scale); VECTOR: items a thread moves at once, which divides the columns; KEPT: so many vectors of a thread stay in
// registers between the scale and the codes (MODE 0), which must be all of the row, or 0: the row is read twice.
#pragma once

#include "fused_elements.cuh"
#include "fused_reduction.cuh"
#include "types.cuh"

#ifndef MODE
#define MODE 0
#endif
#ifndef VECTOR
#define VECTOR 8
#endif
#ifndef THREADS
#define THREADS 256
#endif
#ifndef KEPT
#define KEPT 0
#endif

constexpr int kGroup = 128;
constexpr float kTop = 448.0f;
static_assert(VECTOR == 1 || VECTOR == 2 || VECTOR == 4 || VECTOR == 8, "up to 16 bytes");

template <int COUNT>
__device__ __forceinline__ uint32_t largest(const float (&values)[COUNT]) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) bits = max(bits, magnitude_bits(values[i]));
    return bits;
}

template <int COUNT>
__device__ __forceinline__ void store_codes(uint8_t* target, const float (&values)[COUNT], float scale) {
    Vector<uint8_t, COUNT> codes;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) codes.items[i] = float8_code(values[i], scale);
    *reinterpret_cast<Vector<uint8_t, COUNT>*>(target) = codes;
}

__device__ __forceinline__ void store_padding(uint8_t* codes, int columns, int stride) {
    for (int column = columns + threadIdx.x; column < stride; column += THREADS) codes[column] = 0;
}

// The row's codes, and zeros behind its columns up to `stride`.
__device__ __forceinline__ void store_row(const Element* x, uint8_t* codes, int columns, int stride, float scale) {
    for (int column = threadIdx.x * VECTOR; column < columns; column += THREADS * VECTOR) {
        float values[VECTOR];
        load(x + column, values);
        store_codes(codes + column, values, scale);
    }
    store_padding(codes, columns, stride);
}

// The same with the row's own scale, for KEPT > 0: all loads are under way at once.
__device__ __forceinline__ void quantize_kept_row(const Element* x, uint8_t* codes, float* scale, int columns, int stride,
                                                  uint32_t* scratch) {
    float values[KEPT > 0 ? KEPT : 1][VECTOR];
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        const int column = (i * THREADS + threadIdx.x) * VECTOR;
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) values[i][k] = 0.0f;
        if (column < columns) load(x + column, values[i]);
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i) bits = max(bits, largest(values[i]));
    const float own = dynamic_scale(block_max<THREADS>(bits, scratch), kTop);
    if (threadIdx.x == 0) *scale = own;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        const int column = (i * THREADS + threadIdx.x) * VECTOR;
        if (column < columns) store_codes(codes + column, values[i], own);
    }
    store_padding(codes, columns, stride);
}

// `scale`: the row's (MODE 0: to be written; 2: given), or that of its first 128 columns, others `scale_stride` on (1).
// With MODE 1, blocks of a row share its columns by blockIdx.y.
__device__ __forceinline__ void quantize_row(const Element* x, uint8_t* codes, float* scale, int columns, int stride,
                                             int scale_stride) {
    if (MODE == 2) {
        store_row(x, codes, columns, stride, *scale);
    } else if (MODE == 0) {
        __shared__ uint32_t scratch[THREADS / 32];
        if (KEPT > 0) return quantize_kept_row(x, codes, scale, columns, stride, scratch);
        uint32_t bits = 0;
        for (int column = threadIdx.x * VECTOR; column < columns; column += THREADS * VECTOR) {
            float values[VECTOR];
            load(x + column, values);
            bits = max(bits, largest(values));
        }
        const float own = dynamic_scale(block_max<THREADS>(bits, scratch), kTop);
        if (threadIdx.x == 0) *scale = own;
        store_row(x, codes, columns, stride, own);
    } else {
        const int first = (blockIdx.y * THREADS + threadIdx.x) / 16 * kGroup, lane = threadIdx.x % 16;
        float values[kGroup / 16 / VECTOR][VECTOR];
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kGroup / 16 / VECTOR; ++i) {
            const int column = first + (i * 16 + lane) * VECTOR;
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) values[i][k] = 0.0f;
            if (column < columns) load(x + column, values[i]);
            bits = max(bits, largest(values[i]));
        }
        const float own = dynamic_scale(lane_max<16>(bits), kTop);
#pragma unroll
        for (int i = 0; i < kGroup / 16 / VECTOR; ++i) {
            const int column = first + (i * 16 + lane) * VECTOR;
            if (column < stride) store_codes(codes + column, values[i], own);
        }
        if (lane == 0 && first < columns) scale[static_cast<int64_t>(first / kGroup) * scale_stride] = own;
    }
}
