// What the kernels for many tokens keep of packed integer weights in a stage of shared memory.
#pragma once

#include "types.cuh"

#ifndef CODE_BITS
#define CODE_BITS 4  // of a stored code: 2, 3, 4, 8
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
#define SCALE_TYPE 1  // of scales and offsets: 0 fp16, 1 bf16, 2 float
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

constexpr int kScaleBytes = SCALE_TYPE == 2 ? 4 : 2;
constexpr int kChunkBytes = 64 * 64 * CODE_BITS / 8;
constexpr int kGroupsPerChunk = GROUP == 0 ? 0 : GROUP >= 64 ? 1 : 64 / GROUP;
constexpr int kGroupsPerStage = GROUP == 0 ? 0 : GROUP >= 64 * CHUNKS ? 1 : kGroupsPerChunk * CHUNKS;

// For each super row of 64 rows: codes, scales, zero points, offsets.
constexpr int kCodeBytes = CHUNKS * kChunkBytes;
constexpr int kScaleStage = kGroupsPerStage * 64 * kScaleBytes;
constexpr int kZeroStage = ZEROS == 1 ? kGroupsPerStage * 64 : 0;
constexpr int kOffsetStage = ZEROS == 2 ? kScaleStage : 0;
constexpr int kSuperRowBytes = kCodeBytes + kScaleStage + kZeroStage + kOffsetStage;

struct PackedWeights {
    int groups;
    float scale_factor;      // a power of two that brings scales into the inputs' type
    float output_factor;     // its inverse
    const uint8_t* codes;    // [super rows][chunks][kChunkBytes]
    const uint8_t* scales;   // [super rows][groups][64]
    const uint8_t* zeros;    // the same, bytes
    const uint8_t* offsets;  // as scales

    // The line of scales of a chunk's first group.
    __device__ __forceinline__ int64_t line(int64_t super_row, int chunk) const {
        return super_row * groups + (GROUP > 64 ? chunk * 64 / (GROUP == 0 ? 1 : GROUP) : chunk * kGroupsPerChunk);
    }
};
