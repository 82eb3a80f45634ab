// Stores to another block's shared memory (sm_90) that count as bytes at that block's mbarrier.
#pragma once

#include "types.cuh"

// Both addresses as `cluster_map` gives them, in the same block.
__device__ __forceinline__ void remote_store(uint32_t mapped, float4 value, uint32_t mapped_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     mapped),
                 "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(mapped_barrier)
                 : "memory");
}
