// From accumulators to the output: transposed through shared memory, so that global memory sees whole lines.
#pragma once

#include "integer_wgmma_weights.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/store_matrices.cuh"

constexpr int kAccumulators = TOKENS / 2;

__device__ __forceinline__ float bias_of(const Problem& problem, int row) {
    if (problem.bias == nullptr || row >= problem.rows) return 0.0f;
    if (kIsBf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(problem.bias)[row]);
    return __half2float(static_cast<const __half*>(problem.bias)[row]);
}

__device__ __forceinline__ uint16_t output_bits(float value) {
    return kIsBf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value)) : __half_as_ushort(__float2half_rn(value));
}

__device__ __forceinline__ uint32_t output_pair(float low, float high) {
    uint32_t pair;
    if (kIsBf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
}

// The factor of a row: its scale where a row has one, and the power of two that inputs of scales were brought in by.
__device__ __forceinline__ float row_factor(const Problem& problem, int row) {
    if (GROUP != 0) return problem.output_factor;
    if (row >= problem.rows) return 0.0f;
    const int place = row % 8 * 8 + row % 64 / 16 * 2 + row % 16 / 8;
    const int64_t index = static_cast<int64_t>(row / 64) * 64 + place;
    if (SCALE_TYPE == 2) return reinterpret_cast<const float*>(problem.scales)[index];
    return number_of(reinterpret_cast<const uint16_t*>(problem.scales)[index]);
}

// Eight outputs of one token, or fewer at the edge.
__device__ __forceinline__ void store_outputs(const Problem& problem, int token, int row, const uint4& values) {
    uint16_t* output = static_cast<uint16_t*>(problem.output) + static_cast<int64_t>(token) * problem.rows + row;
    if (problem.rows % 8 == 0) {
        if (row < problem.rows) *reinterpret_cast<uint4*>(output) = values;
        return;
    }
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (row + i < problem.rows) output[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
}

// A warpgroup's tiles, complete: `staging` is its own.
__device__ __forceinline__ void store_tile(const Problem& problem, const float (&sums)[TILES][kAccumulators],
                                           uint8_t* staging, int warpgroup, int first_row, int first_token) {
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    named_barrier_sync(1 + warpgroup, 128);  // the tile before is out
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const int row = first_row + tile * 64 + warp * 16 + lane / 4;
        const float factors[2] = {row_factor(problem, row), row_factor(problem, row + 8)};
        const float biases[2] = {bias_of(problem, row), bias_of(problem, row + 8)};
        // Lane l gives the place of row l % 8 of matrix l / 8: 8 rows h = 0, 1 of the weight, then 8 more tokens.
        const int token = lane / 16 * 8 + lane % 8, column = tile * 64 + warp * 16 + lane / 8 % 2 * 8;
        const uint32_t place = shared_address(staging) + (token * kOutputStride + column) * 2;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j += 2) {
            uint32_t pairs[4];
#pragma unroll
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int half = matrix % 2, first = 4 * (j + matrix / 2) + 2 * half;
                pairs[matrix] = output_pair(fmaf(sums[tile][first], factors[half], biases[half]),
                                            fmaf(sums[tile][first + 1], factors[half], biases[half]));
            }
            store_matrices_transposed(place + j * 8 * kOutputStride * 2, pairs);
        }
    }
    named_barrier_sync(1 + warpgroup, 128);
    constexpr int kVectors = TILES * 8;
    for (int i = thread; i < TOKENS * kVectors; i += 128) {
        const int token = i / kVectors, column = i % kVectors * 8;
        if (first_token + token >= problem.tokens) break;
        const uint4 values = *reinterpret_cast<const uint4*>(staging + (token * kOutputStride + column) * 2);
        store_outputs(problem, first_token + token, first_row + column, values);
    }
}

// A warpgroup's tiles, to be added to those of the other blocks.
__device__ __forceinline__ void stage_partial(const Problem& problem, const float (&sums)[TILES][kAccumulators],
                                              float* staging, int warpgroup, int first_row) {
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile * 64 + warp * 16 + half * 8 + lane / 4;
            const float factor = row_factor(problem, first_row + row);
            float* place = staging + lane % 4 * 2 * kPartialStride + warpgroup * TILES * 64 + row;
#pragma unroll
            for (int j = 0; j < TOKENS / 8; ++j) {
                place[j * 8 * kPartialStride] = sums[tile][4 * j + 2 * half] * factor;
                place[(j * 8 + 1) * kPartialStride] = sums[tile][4 * j + 2 * half + 1] * factor;
            }
        }
    }
}

// This block's share of the tokens, summed over the blocks that share the tile, always in the same order.
__device__ __forceinline__ void store_sums(const Problem& problem, const float* staging, uint32_t split,
                                           uint32_t sharer, int first_row, int first_token) {
    constexpr int kShare = TOKENS / SPLIT, kVectors = kRows / 8;
    const uint32_t own = shared_address(staging);
    uint32_t parts[SPLIT];
#pragma unroll
    for (int i = 0; i < SPLIT; ++i) parts[i] = cluster_map(own, i * MULTICAST + sharer);
    for (int i = threadIdx.x; i < kShare * kVectors; i += kConsumers) {
        const int token = static_cast<int>(split) * kShare + i / kVectors, column = i % kVectors * 8;
        if (first_token + token >= problem.tokens) break;
        float sums[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) sums[k] = bias_of(problem, first_row + column + k);
#pragma unroll
        for (int part = 0; part < SPLIT; ++part) {
            const uint32_t place = parts[part] + (token * kPartialStride + column) * 4;
            const float4 low = cluster_load_float4(place), high = cluster_load_float4(place + 16);
            sums[0] += low.x, sums[1] += low.y, sums[2] += low.z, sums[3] += low.w;
            sums[4] += high.x, sums[5] += high.y, sums[6] += high.z, sums[7] += high.w;
        }
        const uint4 values = {output_pair(sums[0], sums[1]), output_pair(sums[2], sums[3]),
                              output_pair(sums[4], sums[5]), output_pair(sums[6], sums[7])};
        store_outputs(problem, first_token + token, first_row + column, values);
    }
}
