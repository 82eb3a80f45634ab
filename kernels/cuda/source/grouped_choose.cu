// The experts of each token: those with the largest logits, the lower number first where two are equal, and their shares of
// the softmax over all experts, or over the chosen ones alone. One warp a token. A token whose logits are no numbers gets
// the expert -1.
#include "fused_reduction.cuh"
#include "ptx/grid_dependency.cuh"
#include "types.cuh"

#ifndef EXPERTS
#define EXPERTS 128
#endif
#ifndef TOP_K
#define TOP_K 8
#endif
#ifndef NORMALIZES  // the shares of a token's experts add up to 1
#define NORMALIZES 1
#endif
#ifndef WARPS
#define WARPS 4
#endif

constexpr int kOwn = (EXPERTS + 31) / 32;  // logits of a lane
static_assert(TOP_K <= EXPERTS && TOP_K <= 32, "a lane keeps one of the chosen");

__device__ __forceinline__ float lowest() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    grouped_choose(const float* logits, int32_t* ids, float* weights, int tokens) {
    const int lane = threadIdx.x % 32;
    const int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    grid_dependency_launch();
    grid_dependency_wait();
    if (token >= tokens) return;
    float own[kOwn];
    float largest = lowest();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int expert = i * 32 + lane;
        own[i] = expert < EXPERTS ? logits[token * EXPERTS + expert] : lowest();
        largest = fmaxf(largest, own[i]);
    }
    largest = warp_max(largest);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) total += expf(own[i] - largest);
    total = lane_sum<32>(total);

    int chosen = -1;  // of this lane
    float share = 0.0f, shares = 0.0f;
#pragma unroll 1
    for (int k = 0; k < TOP_K; ++k) {
        float best = lowest();
        int expert = -1;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (own[i] > best) best = own[i], expert = i * 32 + lane;
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            const float other = __shfl_xor_sync(FULL_WARP, best, offset);
            const int other_expert = __shfl_xor_sync(FULL_WARP, expert, offset);
            const bool is_better = other > best || (other == best && other_expert >= 0 && other_expert < expert);
            if (is_better) best = other, expert = other_expert;
        }
        const float own_share = expf(best - largest) / total;
        shares += own_share;
        if (lane == k) chosen = expert, share = own_share;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (i * 32 + lane == expert) own[i] = lowest();
        }
    }
    if (lane < TOP_K) {
        ids[token * TOP_K + lane] = chosen;
        weights[token * TOP_K + lane] = NORMALIZES ? share / shares : share;
    }
}
