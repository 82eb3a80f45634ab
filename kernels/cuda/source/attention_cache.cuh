// Number formats of the paged KV cache, and how their items become operands of the matrix instructions.
//
// A page of one KV head is [BLOCK_SIZE, HEAD_DIM], dense; pages are [num_blocks, NUM_KV_HEADS]. bf16 items are
// multiplied as bf16, all others as fp16, which holds FP8 e4m3 and int8 exactly. Scales stay outside the products:
// those of a head multiply the scores or the result, those of a head vector the scores or the weights of the values.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef GROUP
#define GROUP 4
#endif
#ifndef NUM_KV_HEADS
#define NUM_KV_HEADS 8
#endif
#ifndef BLOCK_SIZE
#define BLOCK_SIZE 16
#endif
#ifndef KEY_FORMAT
#define KEY_FORMAT 0
#endif
#ifndef VALUE_FORMAT
#define VALUE_FORMAT 0
#endif

enum CacheFormat { BF16_CACHE = 0, FP16_CACHE = 1, FP8_CACHE = 2, INT8_CACHE = 3 };

__host__ __device__ constexpr int item_bytes(int format) { return format == BF16_CACHE || format == FP16_CACHE ? 2 : 1; }
__host__ __device__ constexpr bool multiplies_bf16(int format) { return format == BF16_CACHE; }
__host__ __device__ constexpr bool scales_heads(int format) { return format == FP8_CACHE; }
__host__ __device__ constexpr bool scales_vectors(int format) { return format == INT8_CACHE; }

// Two floats as a pair of operands, the first in the low half.
template <bool IS_BF16>
__device__ __forceinline__ unsigned pack_pair(float low, float high) {
  union {
    __nv_bfloat162 bf16;
    __half2 fp16;
    unsigned word;
  } pair;
  pair.word = 0;
  if (IS_BF16) {
    pair.bf16 = __floats2bfloat162_rn(low, high);
  } else {
    pair.fp16 = __floats2half2_rn(low, high);
  }
  return pair.word;
}

// Two 8-bit codes, the lower byte first, as a pair of fp16 numbers.
template <int FORMAT>
__device__ __forceinline__ unsigned decode_pair(unsigned codes) {
  static_assert(item_bytes(FORMAT) == 1, "8-bit formats");
  union {
    __half2 fp16;
    __half2_raw raw;
    unsigned word;
  } pair;
  pair.word = 0;
  if (FORMAT == FP8_CACHE) {
    pair.raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes & 0xffffu), __NV_E4M3);
  } else {  // 0x6400 is 1024 in fp16: below it, the lowest bits of the significand are units
    pair.word = __byte_perm((codes & 0xffffu) ^ 0x8080u, 0x64646464u, 0x4140);
    const __half2 bias = __floats2half2_rn(1152.0f, 1152.0f);
    pair.fp16 = __hsub2(pair.fp16, bias);
  }
  return pair.word;
}
