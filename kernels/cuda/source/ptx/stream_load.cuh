// Reads of global memory that pass through the caches once, or that go around the first of them.
#pragma once

#include "types.cuh"

// 16 bytes of a stream that is read once.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

// 8 and 4 bytes of a stream.
__device__ __forceinline__ uint2 load_once(const uint2* address) {
    uint2 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "l"(address));
    return value;
}
__device__ __forceinline__ uint32_t load_once(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.u32 %0, [%1];" : "=r"(value) : "l"(address));
    return value;
}

// 16 bytes of a table that stays in L2 and is too large for L1.
__device__ __forceinline__ uint4 load_from_l2(const uint4* address) {
    uint4 value;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(address));
    return value;
}
