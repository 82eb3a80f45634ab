// How integer_decode.cu adds up what its warps and blocks have, and stores it.
#pragma once

#include "integer_decode_multiply.cuh"
#if __CUDA_ARCH__ >= 900
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/remote_store.cuh"
#endif

// A warp's sums to shared memory, as [tokens][kPartialStride].
__device__ __forceinline__ void store_partials(float* partials, const Sums& sums, int num_tokens, int lane) {
#pragma unroll
    for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = token_tile * 8 + lane % 4 * 2 + i % 2;
            if (token >= num_tokens) continue;
#pragma unroll
            for (int tile = 0; tile < PART_TILES; ++tile) {
                partials[token * kPartialStride + tile * 16 + i / 2 * 8 + lane / 4] = sums[tile][token_tile][i];
            }
        }
    }
}

// The sum over the warps of a block that share rows, for four rows of a token.
__device__ __forceinline__ float4 sum_partials(const float* partials, int row_part, int token, int row) {
    const float* first = partials + (row_part * WARP_COLUMNS * kMaxTokens + token) * kPartialStride + row;
    float4 sum = *reinterpret_cast<const float4*>(first);
#pragma unroll
    for (int part = 1; part < WARP_COLUMNS; ++part) {
        const float4 more = *reinterpret_cast<const float4*>(first + part * kMaxTokens * kPartialStride);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    return sum;
}

// Scales, bias, rounding and the store of four outputs of a token.
__device__ __forceinline__ void store_outputs(float4 sum, int first, int token, const Weight& weight,
                                              const float* bias, Element* y) {
    if (first >= OUT_FEATURES) return;
    const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
    Element items[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int output = first + i;
        float value = sums[i];
        if (kRowScales) {
            const int row = output % 64, place = row % 8 * 8 + row / 16 * 2 + row / 8 % 2;
            const int64_t index = static_cast<int64_t>(output / 64) * 64 + place;
            if (SCALE_TYPE == 2) value *= reinterpret_cast<const float*>(weight.scales)[index];
            if (SCALE_TYPE == 1) {
                value *= __uint_as_float(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(weight.scales)[index]) << 16);
            }
            if (SCALE_TYPE == 0) value *= __half2float(reinterpret_cast<const __half*>(weight.scales)[index]);
            if (stored_bytes(SCALE_TYPE) == 1) value *= stored_number<SCALE_TYPE>(weight.scales[index], 0);
        }
        if (EXTRAS) value *= weight.factor;
        if (HAS_BIAS && output < OUT_FEATURES) value += bias[output];
        items[i] = from_float(value);
    }
    Element* target = y + static_cast<int64_t>(token) * OUT_FEATURES + first;
    if (OUT_FEATURES % 4 == 0) {
        *reinterpret_cast<uint2*>(target) = make_uint2(items[0] | items[1] << 16, items[2] | items[3] << 16);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i < OUT_FEATURES) target[i] = items[i];
        }
    }
}

// Adds up what the warps and blocks have of a pass's rows, and stores it.
__device__ __forceinline__ void finish_pass(uint8_t* shared, const float* partials, int pass, int cluster, int rank,
                                            int num_tokens, const Weight& weight, const float* bias, Element* y) {
    constexpr int kQuads = WARP_ROWS * kPartRows / 4;
#if __CUDA_ARCH__ >= 900
    const int buffer = pass % kReceivedBuffers;
    float* received = reinterpret_cast<float*>(shared + kReceivedOffset) + buffer * kReceivedFloats;
    const uint32_t barrier = shared_address(shared + kBarrierOffset) + (kReceivedBarrier + buffer) * 8;
    if (CLUSTER > 1 && threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier, CLUSTER * num_tokens * kOwnRows * 4);
    }
#endif
    __syncthreads();
    for (int i = threadIdx.x; i < num_tokens * kQuads; i += kThreads) {
        const int token = i / kQuads, row = i % kQuads * 4;  // of the pass
        const float4 sum = sum_partials(partials, row / kPartRows, token, row % kPartRows);
        if (CLUSTER > 1) {
#if __CUDA_ARCH__ >= 900
            const float* target = received + (rank * kMaxTokens + token) * kOwnRows + row % kOwnRows;
            const int owner = row / kOwnRows;
            remote_store(cluster_map(shared_address(target), owner), sum, cluster_map(barrier, owner));
#endif
        } else {
            store_outputs(sum, part_of(cluster, pass, row / kPartRows) * kPartRows + row % kPartRows, token, weight, bias, y);
        }
    }
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) {
        mbarrier_wait(barrier, pass / kReceivedBuffers % 2);
        constexpr int kOwnQuads = kOwnRows / 4;
        for (int i = threadIdx.x; i < num_tokens * kOwnQuads; i += kThreads) {
            const int token = i / kOwnQuads, own = i % kOwnQuads * 4, row = rank * kOwnRows + own;
            const float* first = received + token * kOwnRows + own;
            float4 sum = *reinterpret_cast<const float4*>(first);
#pragma unroll
            for (int source = 1; source < CLUSTER; ++source) {
                const float4 more = *reinterpret_cast<const float4*>(first + source * kMaxTokens * kOwnRows);
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            store_outputs(sum, part_of(cluster, pass, row / kPartRows) * kPartRows + row % kPartRows, token, weight, bias, y);
        }
    }
#endif
    if (kPasses > 1 && CLUSTER == 1) __syncthreads();  // the next pass's partial sums come to the same place
}
