// What the kernels for many tokens keep of packed integer weights in a stage of shared memory.
#pragma once

#include "stored_scales.cuh"
#include "types.cuh"

#ifndef CODE_BITS
#define CODE_BITS 4  // of a stored code: 2, 3, 4, 5, 6, 8
#endif
#ifndef CODE_FLOAT8
#define CODE_FLOAT8 0  // codes of 8 bits are FP8 e4m3
#endif
#ifndef GROUP
#define GROUP 128  // columns that share a scale; 0: one scale a row
#endif
#ifndef ZEROS
#define ZEROS 0  // 0: the zero point is 2^(CODE_BITS - 1); 1: zero points; 2: offsets, W = code * scale + offset
#endif
#ifndef SCALE_TYPE
#define SCALE_TYPE 1  // of scales and offsets, as stored_scales.cuh has them
#endif
#ifndef CHUNKS
#define CHUNKS 2  // of 64 columns a stage
#endif
#ifndef BFLOAT
#define BFLOAT 1  // the 16-bit type is bf16, else fp16
#endif

static_assert(!CODE_FLOAT8 || (CODE_BITS == 8 && ZEROS == 0), "FP8 codes have no zero point");
static_assert(CHUNKS == 1 || CHUNKS == 2, "columns are padded to 128");
static_assert(GROUP == 0 || GROUP % 128 == 0 || GROUP == 64 || GROUP == 32 || GROUP == 16, "groups of whole steps");

constexpr int kScaleBytes = stored_bytes(SCALE_TYPE);
constexpr int kChunkBytes = 64 * 64 * CODE_BITS / 8;
constexpr int kGroupsPerChunk = GROUP == 0 ? 0 : GROUP >= 64 ? 1 : 64 / GROUP;
constexpr int kGroupsPerStage = GROUP == 0 ? 0 : GROUP >= 64 * CHUNKS ? 1 : kGroupsPerChunk * CHUNKS;

// For each super row of 64 rows: codes, scales, zero points, offsets, and the fp16 numbers that 256 columns share.
constexpr int kCodeBytes = CHUNKS * kChunkBytes;
constexpr int kScaleStage = kGroupsPerStage * 64 * kScaleBytes;
constexpr int kZeroStage = ZEROS == 1 ? kGroupsPerStage * 64 : 0;
constexpr int kOffsetStage = ZEROS == 2 ? kScaleStage : 0;
constexpr bool kSupers = SCALE_TYPE == kScaleSuper;
constexpr int kSuperStage = kSupers ? (ZEROS == 2 ? 2 : 1) * 64 * 2 : 0;
constexpr int kSuperStart = kCodeBytes + kScaleStage + kZeroStage + kOffsetStage;
constexpr int kSuperRowBytes = kSuperStart + kSuperStage;

struct PackedWeights {
    int groups;
    float scale_factor;      // a power of two that brings scales into the inputs' type
    float output_factor;     // its inverse
    const uint8_t* codes;    // [super rows][chunks][kChunkBytes]
    const uint8_t* scales;   // [super rows][groups][64]
    const uint8_t* zeros;    // the same, bytes
    const uint8_t* offsets;  // as scales
    const uint8_t* supers;   // [super rows][256 columns][scales, offsets][64]

    // The supers of a chunk, in a super row with `chunks` of them.
    __device__ __forceinline__ const uint8_t* super_line(int64_t super_row, int64_t chunks, int chunk) const {
        return supers + (super_row * (chunks / 4) + chunk / 4) * kSuperStage;
    }

    // The line of scales of a chunk's first group.
    __device__ __forceinline__ int64_t line(int64_t super_row, int chunk) const {
        return super_row * groups + (GROUP > 64 ? chunk * 64 / (GROUP == 0 ? 1 : GROUP) : chunk * kGroupsPerChunk);
    }
};
