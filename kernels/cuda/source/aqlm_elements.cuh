// How AQLM codes lie in memory, for all kernels that read them.
//
// A slice is 32 words of WORD_CODES codes: code k of word l is table T = k * 32 + l of the slice, which stands for group
// T % SLICE_GROUPS of the slice's input groups and codebook T / SLICE_GROUPS. A tile is 32 rows of a slice, 4096 bytes:
// word l of row 4 q + r lies at word (q * 32 + l) * 4 + r, so that a vector of 16 bytes is one word of four rows.
// Order of tiles: [slice][tile of rows].
//
// Macros: ELEMENT_IS_BF16, CODEBOOKS, CODE_BYTES (1, 2, 4).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "types.cuh"

#ifndef ELEMENT_IS_BF16
#define ELEMENT_IS_BF16 1
#endif
#ifndef CODEBOOKS
#define CODEBOOKS 2
#endif
#ifndef CODE_BYTES
#define CODE_BYTES 1
#endif

constexpr bool kIsBfloat = ELEMENT_IS_BF16;
constexpr int WORD_CODES = 4 / CODE_BYTES;
constexpr int SLICE_TABLES = 32 * WORD_CODES;
constexpr int TILE_ROWS = 32;
constexpr int TILE_VECTORS = 256;  // of 16 bytes

__host__ __device__ constexpr int power_of_two_from(int count) {
    return count <= 1 ? 1 : 2 * power_of_two_from((count + 1) / 2);
}
constexpr int SLICE_GROUPS = SLICE_TABLES / power_of_two_from(CODEBOOKS);
static_assert(SLICE_GROUPS >= 1, "a slice holds all codes of a group");

__device__ __forceinline__ uint16_t element_bits(float value) {
    return kIsBfloat ? __bfloat16_as_ushort(__float2bfloat16_rn(value)) : __half_as_ushort(__float2half_rn(value));
}
