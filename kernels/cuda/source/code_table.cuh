// Codes of 4 bits that stand for the numbers of a table: two at a time are looked up in shared memory.
//
// CODE_TABLE lists the 16 numbers in the type of the inputs, by their bits. Shared memory holds the words of all 256 pairs,
// each once for every lane, so that 32 lanes read 32 banks whatever their codes are: 32 KB. A byte of a word of codes
// (lookup/packing.py) is the pair of one fragment register. Shifting it to the pair's address takes as many instructions as
// making integers of it.
#pragma once

#include "integer_dequantize.cuh"
#include "ptx/packed_math.cuh"
#include "types.cuh"

#ifdef CODE_TABLE
#define HAS_CODE_TABLE 1
static_assert(CODE_BITS == 4, "a table has 16 numbers");

constexpr int kPairs = 256, kPairBytes = 32 * 4;
__constant__ const uint16_t kCodeTable[16] = {CODE_TABLE};

__device__ __forceinline__ uint8_t* code_pairs() {
    __shared__ __align__(128) uint8_t pairs[kPairs * kPairBytes];
    return pairs;
}

// Every thread of the block; a barrier must follow before the first look-up.
__device__ __forceinline__ void fill_code_table() {
    for (int i = threadIdx.x; i < kPairs * kPairBytes / 16; i += blockDim.x) {
        const int pair = i / (kPairBytes / 16);
        const uint32_t low = kCodeTable[pair % 16], high = kCodeTable[pair / 16], word = low | high << 16;
        reinterpret_cast<uint4*>(code_pairs())[i] = make_uint4(word, word, word, word);
    }
}

// The A fragment of k16-step STEP: the numbers of the table.
template <int STEP>
__device__ __forceinline__ void look_up(const LaneCodes<4>& codes, uint32_t (&fragment)[4]) {
    const uint32_t lane = threadIdx.x % 32 * 4, word = codes.words[STEP];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const uint32_t moved = r == 0 ? word << 7 : word >> (8 * r - 7);
        fragment[r] = *reinterpret_cast<const uint32_t*>(code_pairs() + mask_and_set(moved, 0x7F80u, lane));
    }
}
#else
#define HAS_CODE_TABLE 0
__device__ __forceinline__ void fill_code_table() {}
#endif
