// wgmma (sm_90a): one warpgroup multiplies a 64-row A with an N-column B into float registers, asynchronously.
//
// A comes from registers (the fragment of mma.m16n8k16, 16 rows a warp) or from shared memory, B from shared memory, both
// K-major in rows of 128 bytes with 128-byte swizzle. A register that an instruction in flight reads or adds to must not be
// touched before wgmma_wait has covered it.
//
// In the fragment of D, d[4 * j + 2 * h + c] is row 16 * warp + lane / 4 + 8 * h, column 8 * j + 2 * (lane % 4) + c.
#pragma once

#include "types.cuh"

// Orders accesses to registers and shared memory before the next wgmma.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` committed groups are in flight.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving accesses of a register that a wgmma in flight uses across this point.
__device__ __forceinline__ void wgmma_pin(float& value) {
    asm volatile("" : "+f"(value)::"memory");
}

__device__ __forceinline__ void wgmma_pin(uint32_t& value) {
    asm volatile("" : "+r"(value)::"memory");
}

// A tile of rows of 128 bytes, 128-byte swizzled, at a shared memory address that is a multiple of 1024 (plus the bytes
// of earlier K steps within the row).
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
    constexpr uint64_t kSwizzle128 = 1ull << 62;
    constexpr uint64_t kStrideOfEightRows = (1024ull >> 4) << 32;
    return kSwizzle128 | kStrideOfEightRows | (1ull << 16) | ((address & 0x3FFFF) >> 4);
}

template <int registers>
__device__ __forceinline__ void warpgroup_take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ __forceinline__ void warpgroup_give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// Register lists of the accumulator, eight at a time.
#define WGMMA_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_NAMES_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_NAMES_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_NAMES_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_NAMES_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_NAMES_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_NAMES_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_NAMES_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_NAMES_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_NAMES_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_NAMES_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_NAMES_UP_TO_4 "%0, %1, %2, %3"
#define WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_EIGHT(i) WGMMA_FOUR(i), WGMMA_FOUR(i + 4)
#define WGMMA_OPERANDS_UP_TO_4 WGMMA_FOUR(0)
#define WGMMA_NAMES_UP_TO_8 WGMMA_NAMES_0
#define WGMMA_OPERANDS_UP_TO_8 WGMMA_EIGHT(0)
#define WGMMA_NAMES_UP_TO_16 WGMMA_NAMES_UP_TO_8 ", " WGMMA_NAMES_1
#define WGMMA_OPERANDS_UP_TO_16 WGMMA_OPERANDS_UP_TO_8, WGMMA_EIGHT(8)
#define WGMMA_NAMES_UP_TO_32 WGMMA_NAMES_UP_TO_16 ", " WGMMA_NAMES_2 ", " WGMMA_NAMES_3
#define WGMMA_OPERANDS_UP_TO_32 WGMMA_OPERANDS_UP_TO_16, WGMMA_EIGHT(16), WGMMA_EIGHT(24)
#define WGMMA_NAMES_UP_TO_48 WGMMA_NAMES_UP_TO_32 ", " WGMMA_NAMES_4 ", " WGMMA_NAMES_5
#define WGMMA_OPERANDS_UP_TO_48 WGMMA_OPERANDS_UP_TO_32, WGMMA_EIGHT(32), WGMMA_EIGHT(40)
#define WGMMA_NAMES_UP_TO_64 WGMMA_NAMES_UP_TO_48 ", " WGMMA_NAMES_6 ", " WGMMA_NAMES_7
#define WGMMA_OPERANDS_UP_TO_64 WGMMA_OPERANDS_UP_TO_48, WGMMA_EIGHT(48), WGMMA_EIGHT(56)
#define WGMMA_NAMES_UP_TO_80 WGMMA_NAMES_UP_TO_64 ", " WGMMA_NAMES_8 ", " WGMMA_NAMES_9
#define WGMMA_OPERANDS_UP_TO_80 WGMMA_OPERANDS_UP_TO_64, WGMMA_EIGHT(64), WGMMA_EIGHT(72)
#define WGMMA_NAMES_UP_TO_96 WGMMA_NAMES_UP_TO_80 ", " WGMMA_NAMES_10 ", " WGMMA_NAMES_11
#define WGMMA_OPERANDS_UP_TO_96 WGMMA_OPERANDS_UP_TO_80, WGMMA_EIGHT(80), WGMMA_EIGHT(88)
#define WGMMA_NAMES_UP_TO_128 WGMMA_NAMES_UP_TO_96 ", " WGMMA_NAMES_12 ", " WGMMA_NAMES_13 ", " WGMMA_NAMES_14 ", " WGMMA_NAMES_15
#define WGMMA_OPERANDS_UP_TO_128 WGMMA_OPERANDS_UP_TO_96, WGMMA_EIGHT(96), WGMMA_EIGHT(104), WGMMA_EIGHT(112), WGMMA_EIGHT(120)

// `count` is the number of accumulator registers, `r0`.. the positions of the operands after them.
#define WGMMA_FROM_REGISTERS(name, shape, count, r0, r1, r2, r3, r4, r5)                                           \
    __device__ __forceinline__ void name(float(&d)[count], const uint32_t(&a)[4], uint64_t descriptor,            \
                                         int accumulate) {                                                        \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r5 ", 0;\nwgmma.mma_async.sync.aligned." shape " {"    \
                     WGMMA_NAMES_UP_TO_##count "}, {%" #r0 ", %" #r1 ", %" #r2 ", %" #r3 "}, %" #r4               \
                     ", p, 1, 1, 0;\n}"                                                                           \
                     : WGMMA_OPERANDS_UP_TO_##count                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(accumulate));              \
    }

#define WGMMA_FROM_SHARED(name, shape, count, r0, r1, r2, modes)                                                   \
    __device__ __forceinline__ void name(float(&d)[count], uint64_t a_descriptor, uint64_t descriptor,            \
                                         int accumulate) {                                                        \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r2 ", 0;\nwgmma.mma_async.sync.aligned." shape " {"    \
                     WGMMA_NAMES_UP_TO_##count "}, %" #r0 ", %" #r1 ", p, 1, 1" modes ";\n}"                      \
                     : WGMMA_OPERANDS_UP_TO_##count                                                               \
                     : "l"(a_descriptor), "l"(descriptor), "r"(accumulate));                                       \
    }

#define WGMMA_ALL(n, count, r0, r1, r2, r3, r4, r5)                                                                \
    WGMMA_FROM_REGISTERS(wgmma_bf16, "m64n" #n "k16.f32.bf16.bf16", count, r0, r1, r2, r3, r4, r5)                 \
    WGMMA_FROM_REGISTERS(wgmma_f16, "m64n" #n "k16.f32.f16.f16", count, r0, r1, r2, r3, r4, r5)                    \
    WGMMA_FROM_SHARED(wgmma_bf16, "m64n" #n "k16.f32.bf16.bf16", count, r0, r1, r2, ", 0, 0")                      \
    WGMMA_FROM_SHARED(wgmma_f16, "m64n" #n "k16.f32.f16.f16", count, r0, r1, r2, ", 0, 0")                         \
    WGMMA_FROM_SHARED(wgmma_e4m3, "m64n" #n "k32.f32.e4m3.e4m3", count, r0, r1, r2, "")

WGMMA_ALL(8, 4, 4, 5, 6, 7, 8, 9)
WGMMA_ALL(16, 8, 8, 9, 10, 11, 12, 13)
WGMMA_ALL(32, 16, 16, 17, 18, 19, 20, 21)
WGMMA_ALL(64, 32, 32, 33, 34, 35, 36, 37)
WGMMA_ALL(96, 48, 48, 49, 50, 51, 52, 53)
WGMMA_ALL(128, 64, 64, 65, 66, 67, 68, 69)
WGMMA_ALL(160, 80, 80, 81, 82, 83, 84, 85)
WGMMA_ALL(192, 96, 96, 97, 98, 99, 100, 101)
WGMMA_ALL(256, 128, 128, 129, 130, 131, 132, 133)
