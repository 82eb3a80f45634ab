// Thread block clusters: ranks, the cluster barrier, and copies to another block's shared memory.
#pragma once

#include "types.cuh"

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// As cluster_arrive, publishing nothing: for starting and ending together.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where `address` of this block's shared memory is in the block of that rank.
__device__ __forceinline__ uint32_t cluster_map(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// Copies `bytes` (a multiple of 16) of this block's shared memory to `target` in another block, both multiples of 16;
// completes on a barrier there. Both addresses there are mapped.
__device__ __forceinline__ void cluster_copy(uint32_t target, uint32_t source, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     target),
                 "r"(source), "r"(bytes), "r"(barrier)
                 : "memory");
}
