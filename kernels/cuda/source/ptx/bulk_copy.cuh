// The bulk copy engine (sm_90): contiguous bytes and tensor tiles from global to shared memory, completing on an
// mbarrier, with hints of how long L2 should keep them.
#pragma once

#include "types.cuh"

struct alignas(64) TensorMap {
    uint64_t words[16];
};

constexpr uint64_t kCacheEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kCacheEvictLast = 0x14F0000000000000ull;
constexpr uint64_t kCacheEvictNormal = 0x1000000000000000ull;

__device__ __forceinline__ void tensor_map_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// `bytes` must be a multiple of 16, both addresses too.
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier,
                                          uint64_t cache) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared),
        "l"(global), "r"(bytes), "r"(barrier), "l"(cache)
        : "memory");
}

// The box of a two-dimensional tensor map whose first element is at column `x`, row `y`.
__device__ __forceinline__ void tensor_load(uint32_t shared, const TensorMap* map, int x, int y, uint32_t barrier,
                                            uint64_t cache) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "l"(cache)
        : "memory");
}

// The same for a four-dimensional map; coordinates from the innermost dimension outwards.
__device__ __forceinline__ void tensor_load(uint32_t shared, const TensorMap* map, int x, int y, int z, int w,
                                            uint32_t barrier, uint64_t cache) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "l"(cache)
        : "memory");
}

// As tensor_load, to the same address in each block of the cluster whose bit is set in `blocks`; completes on the
// barrier at the same address in each.
__device__ __forceinline__ void tensor_load_multicast(uint32_t shared, const TensorMap* map, int x, int y,
                                                      uint32_t barrier, uint16_t blocks, uint64_t cache) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(blocks), "l"(cache)
        : "memory");
}
