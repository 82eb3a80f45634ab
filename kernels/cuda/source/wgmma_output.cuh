// From accumulators to the output: transposed through shared memory, so that global memory sees whole lines.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/store_matrices.cuh"
#include "wgmma_tile.cuh"

struct Output {
    void* values;       // [tokens][rows]
    const float* bias;  // [rows] or null

    __device__ __forceinline__ float bias_of(int row, int rows) const {
        return bias == nullptr || row >= rows ? 0.0f : bias[row];
    }
    // With the bias of an expert.
    __device__ __forceinline__ Output of(int64_t expert, int rows) const {
        return {values, bias == nullptr ? nullptr : bias + expert * rows};
    }
};

__device__ __forceinline__ uint32_t output_pair(float low, float high) {
    if (kIsBf16) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Eight outputs of one token, or fewer at the edge.
__device__ __forceinline__ void store_outputs(const Output& output, const Extent& extent, int token, int row,
                                              const uint4& values) {
    uint16_t* target = static_cast<uint16_t*>(output.values) + static_cast<int64_t>(token) * extent.rows + row;
    if (extent.rows % 8 == 0) {
        if (row < extent.rows) *reinterpret_cast<uint4*>(target) = values;
        return;
    }
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (row + i < extent.rows) target[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
}

// kPiece tokens of a warpgroup's tiles, from `PIECE` on, to its own part of shared memory.
template <int PIECE>
__device__ __forceinline__ void stage_outputs(const float (&sums)[TILES][kAccumulators],
                                              const float (&biases)[TILES][2], uint8_t* staging) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        // Lane l gives the place of row l % 8 of matrix l / 8: 8 rows h = 0, 1 of the weight, then 8 more tokens.
        const int token = lane / 16 * 8 + lane % 8, column = tile * 64 + warp * 16 + lane / 8 % 2 * 8;
        const uint32_t place = shared_address(staging) + (token * kOutputStride + column) * 2;
#pragma unroll
        for (int j = 0; j < kPiece / 8; j += 2) {
            uint32_t pairs[4];
#pragma unroll
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int half = matrix % 2, first = 4 * (PIECE / 8 + j + matrix / 2) + 2 * half;
                const float bias = biases[tile][half];
                pairs[matrix] = output_pair(sums[tile][first] + bias, sums[tile][first + 1] + bias);
            }
            store_matrices_transposed(place + j * 8 * kOutputStride * 2, pairs);
        }
    }
}

// A warpgroup's tiles, complete. `staging` is its own, `first_row` and `first_token` those of its tiles.
template <int PIECE = 0>
__device__ __forceinline__ void store_tile(const Output& output, const Extent& extent,
                                           const float (&sums)[TILES][kAccumulators], const float (&biases)[TILES][2],
                                           uint8_t* staging, int warpgroup, int first_row, int first_token) {
    if (first_token + PIECE >= extent.tokens) return;
    named_barrier_sync(1 + warpgroup, 128);  // the piece before is out
    stage_outputs<PIECE>(sums, biases, staging);
    named_barrier_sync(1 + warpgroup, 128);
    constexpr int kVectors = TILES * 8, kRounds = kPiece * kVectors / 128;
    static_assert(kPiece * kVectors % 128 == 0, "the same for every thread");
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const int i = round * 128 + threadIdx.x % 128, token = i / kVectors, column = i % kVectors * 8;
        if (first_token + PIECE + token >= extent.tokens) continue;
        const uint4 values = *reinterpret_cast<const uint4*>(staging + (token * kOutputStride + column) * 2);
        store_outputs(output, extent, first_token + PIECE + token, first_row + column, values);
    }
    if constexpr (PIECE + kPiece < TOKENS) {
        store_tile<PIECE + kPiece>(output, extent, sums, biases, staging, warpgroup, first_row, first_token);
    }
}

// A warpgroup's tiles, to be added to those of the other blocks.
__device__ __forceinline__ void stage_partial(const float (&sums)[TILES][kAccumulators], float* staging,
                                              int warpgroup) {
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = (warpgroup * TILES + tile) * 64 + warp * 16 + half * 8 + lane / 4;
            float* place = staging + lane % 4 * 2 * kPartialStride + row;
#pragma unroll
            for (int j = 0; j < TOKENS / 8; ++j) {
                place[j * 8 * kPartialStride] = sums[tile][4 * j + 2 * half];
                place[(j * 8 + 1) * kPartialStride] = sums[tile][4 * j + 2 * half + 1];
            }
        }
    }
}

// Sends the other blocks their shares of the tokens.
__device__ __forceinline__ void send_partials(const BlockPart& block, const float* staging) {
    fence_shared_to_async_proxy();
    named_barrier_sync(15, kConsumers);
    const uint32_t owner = threadIdx.x;
    if (owner >= SPLIT || owner == block.split) return;
    const uint32_t rank = owner * MULTICAST + block.sharer, slot = block.split - (block.split > owner);
    const uint32_t target = cluster_map(block.shared + kReceivedStart + slot * kShareBytes, rank);
    cluster_copy(target, shared_address(staging) + owner * kShareBytes, kShareBytes,
                 cluster_map(block.shared + kReceivedBarrier, rank));
}

// This block's share of the tokens, summed over the blocks that share the tile, always in the same order.
__device__ __forceinline__ void store_received(const Output& output, const Extent& extent, const BlockPart& block,
                                               const float* staging, const Place& place) {
    constexpr int kVectors = kRows / 8;
    const float* received = reinterpret_cast<const float*>(block.memory + kReceivedStart);
    const float* parts[SPLIT];
#pragma unroll
    for (int i = 0; i < SPLIT; ++i) {
        const int slot = i - (i > static_cast<int>(block.split));
        const bool own = i == static_cast<int>(block.split);
        parts[i] = own ? staging + i * (kShareBytes / 4) : received + slot * (kShareBytes / 4);
    }
    mbarrier_wait(block.shared + kReceivedBarrier, 0);
    for (int i = threadIdx.x; i < kShareTokens * kVectors; i += kConsumers) {
        const int own_token = i / kVectors, column = i % kVectors * 8;
        const int token = place.token() + static_cast<int>(block.split) * kShareTokens + own_token;
        if (token >= extent.tokens) break;
        float sums[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) sums[k] = output.bias_of(place.row() + column + k, extent.rows);
#pragma unroll
        for (int part = 0; part < SPLIT; ++part) {
            const float4* source = reinterpret_cast<const float4*>(parts[part] + own_token * kPartialStride + column);
            const float4 low = source[0], high = source[1];
            sums[0] += low.x, sums[1] += low.y, sums[2] += low.z, sums[3] += low.w;
            sums[4] += high.x, sums[5] += high.y, sums[6] += high.z, sums[7] += high.w;
        }
        const uint4 values = {output_pair(sums[0], sums[1]), output_pair(sums[2], sums[3]),
                              output_pair(sums[4], sums[5]), output_pair(sums[6], sums[7])};
        store_outputs(output, extent, token, place.row() + column, values);
    }
}

// What a multiplying warpgroup does with its finished, scaled sums.
__device__ __forceinline__ void put_out(const Output& all, const Extent& whole, const BlockPart& block,
                                        const float (&sums)[TILES][kAccumulators], int warpgroup, const Place& place) {
    const Output output = all.of(place.expert(), whole.rows);
    Extent extent = whole;
    extent.tokens = place.end_token(whole);
    if (!PERSISTENT) named_barrier_sync(15, kConsumers);  // all have read the stages that the output overwrites
    if constexpr (SPLIT == 1) {
        uint8_t* staging = block.memory + kOutputStart + warpgroup * kPiece * kOutputStride * 2;
        const int first_row = place.row() + warpgroup * TILES * 64;
        float biases[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i) {
            const int row = first_row + i / 2 * 64 + threadIdx.x % 128 / 32 * 16 + i % 2 * 8 + threadIdx.x % 32 / 4;
            biases[i / 2][i % 2] = output.bias_of(row, extent.rows);
        }
        store_tile(output, extent, sums, biases, staging, warpgroup, first_row, place.token());
    } else {
        float* staging = reinterpret_cast<float*>(block.memory + kOutputStart);
        stage_partial(sums, staging, warpgroup);
        send_partials(block, staging);
        store_received(output, extent, block, staging, place);
    }
}
