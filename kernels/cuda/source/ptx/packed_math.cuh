// Arithmetic on words that hold two 16-bit numbers.
#pragma once

#include "types.cuh"

// a * b + c, rounded once, for two bf16 (IS_BF16) or fp16 numbers.
template <bool IS_BF16>
__device__ __forceinline__ uint32_t fused_multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    if (IS_BF16) {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    }
    return d;
}

// (word & mask) | bits, or with XOR (word & mask) ^ bits, in one instruction.
template <bool XOR = false>
__device__ __forceinline__ uint32_t mask_and_set(uint32_t word, uint32_t mask, uint32_t bits) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(word), "r"(mask), "r"(bits), "n"(XOR ? 0x6A : 0xEA));
    return d;
}
