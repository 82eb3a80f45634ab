// Plain stores to another block's shared memory (sm_90), published by the cluster's barrier.
#pragma once

#include "types.cuh"

// `mapped` as `cluster_map` gives it.
__device__ __forceinline__ void cluster_store(uint32_t mapped, float value) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(mapped), "f"(value) : "memory");
}
