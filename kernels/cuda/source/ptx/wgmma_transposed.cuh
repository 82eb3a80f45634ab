// wgmma with other tiles in shared memory than wgmma.cuh's: groups of eight rows that do not follow each other, and a B
// whose rows are the steps of the sum instead of the columns of the result.
//
// Both are 128-byte swizzled: chunk c of 16 bytes of row r in a group of eight rows of 128 bytes lies at chunk c ^ r.
#pragma once

#include "ptx/wgmma.cuh"

// K-major rows of 128 bytes; `stride`: bytes from one group of eight rows to the next.
__device__ __forceinline__ uint64_t wgmma_descriptor_spaced(uint32_t address, uint32_t stride) {
    constexpr uint64_t kSwizzle128 = 1ull << 62;
    return kSwizzle128 | static_cast<uint64_t>(stride >> 4) << 32 | (1ull << 16) | ((address & 0x3FFFF) >> 4);
}

// Rows of 64 columns, a row a step of the sum. `row_stride`: bytes from one group of eight rows to the next;
// `column_stride`: from 64 columns to the next 64.
__device__ __forceinline__ uint64_t wgmma_descriptor_transposed(uint32_t address, uint32_t row_stride,
                                                                uint32_t column_stride) {
    constexpr uint64_t kSwizzle128 = 1ull << 62;
    return kSwizzle128 | static_cast<uint64_t>(row_stride >> 4) << 32 |
           static_cast<uint64_t>(column_stride >> 4) << 16 | ((address & 0x3FFFF) >> 4);
}

// d += a b with a descriptor of wgmma_descriptor_transposed.
#define WGMMA_TRANSPOSED(name, shape, count, r0, r1, r2, r3, r4)                                                   \
    __device__ __forceinline__ void name(float(&d)[count], const uint32_t(&a)[4], uint64_t descriptor) {           \
        asm volatile("wgmma.mma_async.sync.aligned." shape " {" WGMMA_NAMES_UP_TO_##count "}, {%" #r0 ", %" #r1    \
                     ", %" #r2 ", %" #r3 "}, %" #r4 ", 1, 1, 1, 1;"                                                \
                     : WGMMA_OPERANDS_UP_TO_##count                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));                               \
    }

#define WGMMA_TRANSPOSED_ALL(n, count, r0, r1, r2, r3, r4)                                                         \
    WGMMA_TRANSPOSED(wgmma_bf16_transposed, "m64n" #n "k16.f32.bf16.bf16", count, r0, r1, r2, r3, r4)              \
    WGMMA_TRANSPOSED(wgmma_f16_transposed, "m64n" #n "k16.f32.f16.f16", count, r0, r1, r2, r3, r4)

WGMMA_TRANSPOSED_ALL(64, 32, 32, 33, 34, 35, 36)
WGMMA_TRANSPOSED_ALL(128, 64, 64, 65, 66, 67, 68)
