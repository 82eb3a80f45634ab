// The tile of integer_wgmma.cu: macros, what follows from them, and the layout of shared memory.
//
// A block multiplies ROWS = WARPGROUPS * TILES * 64 rows of the weight with TOKENS rows of the input.
#pragma once

#include "ptx/bulk_copy.cuh"
#include "types.cuh"

#ifndef CODE_BITS
#define CODE_BITS 4  // of a stored code: 2, 3, 4, 8
#endif
#ifndef GROUP
#define GROUP 128  // columns that share a scale; 0: one scale a row
#endif
#ifndef ZEROS
#define ZEROS 0  // 0: the zero point is 2^(CODE_BITS - 1); 1: zero points; 2: offsets, W = code * scale + offset
#endif
#ifndef BFLOAT
#define BFLOAT 1  // of inputs and outputs, else fp16
#endif
#ifndef SCALE_TYPE
#define SCALE_TYPE 1  // of scales and offsets: 0 fp16, 1 bf16, 2 float
#endif
#ifndef WARPGROUPS
#define WARPGROUPS 2  // that multiply; one more fetches
#endif
#ifndef TILES
#define TILES 1  // of 64 rows a warpgroup
#endif
#ifndef TOKENS
#define TOKENS 64
#endif
#ifndef CHUNKS
#define CHUNKS 2  // of 64 columns a stage
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef STEPS
#define STEPS 1  // matrix steps of 16 columns that are converted and issued together: 1 or 2
#endif
#ifndef SPLIT
#define SPLIT 1  // blocks of a cluster that share the columns of a tile
#endif
#ifndef MULTICAST
#define MULTICAST 1  // blocks of a cluster that share their inputs
#endif
#ifndef PERSISTENT
#define PERSISTENT 0  // blocks take tile after tile
#endif
#ifndef BLOCKS
#define BLOCKS 1  // on a multiprocessor
#endif

static_assert(STEPS == 1 || STEPS == 2, "the fragments are buffered twice in a chunk of four steps");
static_assert(CHUNKS == 1 || CHUNKS == 2, "columns are padded to 128");
static_assert(GROUP == 0 || GROUP % 128 == 0 || GROUP == 64 || GROUP == 32 || GROUP == 16, "groups of whole steps");
static_assert(SPLIT == 1 || !PERSISTENT, "a split tile is summed up once");
static_assert(TOKENS % (8 * MULTICAST) == 0 && TOKENS <= 256, "whole swizzled rows");
static_assert(TOKENS % SPLIT == 0, "each block of a cluster sums up as many tokens");
static_assert(SPLIT * MULTICAST <= 8, "the largest cluster that every GPU can place");

constexpr bool kIsBf16 = BFLOAT;
constexpr int kRows = WARPGROUPS * TILES * 64;
constexpr int kSuperRows = WARPGROUPS * TILES;
constexpr int kCluster = SPLIT * MULTICAST;
constexpr int kConsumers = WARPGROUPS * 128;
constexpr int kThreads = kConsumers + 128;

constexpr int kScaleBytes = SCALE_TYPE == 2 ? 4 : 2;
constexpr int kChunkBytes = 64 * 64 * CODE_BITS / 8;
constexpr int kGroupsPerChunk = GROUP == 0 ? 0 : GROUP >= 64 ? 1 : 64 / GROUP;
constexpr int kGroupsPerStage = GROUP == 0 ? 0 : GROUP >= 64 * CHUNKS ? 1 : kGroupsPerChunk * CHUNKS;

// One stage, for each super row: codes, scales, zero points, offsets.
constexpr int kInputBytes = CHUNKS * TOKENS * 128;
constexpr int kCodeBytes = CHUNKS * kChunkBytes;
constexpr int kScaleStage = kGroupsPerStage * 64 * kScaleBytes;
constexpr int kZeroStage = ZEROS == 1 ? kGroupsPerStage * 64 : 0;
constexpr int kOffsetStage = ZEROS == 2 ? kScaleStage : 0;
constexpr int kSuperRowBytes = kCodeBytes + kScaleStage + kZeroStage + kOffsetStage;
constexpr int kWeightBytes = kSuperRows * kSuperRowBytes;

// The results on their way out: [token][row], rows padded against bank conflicts; float while blocks still add up.
constexpr int kOutputStride = TILES * 64 + 8;
constexpr int kPartialStride = kRows + 4;
constexpr int kOutputBytes = SPLIT > 1 ? TOKENS * kPartialStride * 4 : WARPGROUPS * TOKENS * kOutputStride * 2;

constexpr int kWeightStart = STAGES * kInputBytes;
constexpr int kStagesEnd = kWeightStart + STAGES * kWeightBytes;
constexpr int kOutputStart = PERSISTENT ? (kStagesEnd + 127) / 128 * 128 : 0;
constexpr int kPayload = kOutputStart + kOutputBytes > kStagesEnd ? kOutputStart + kOutputBytes : kStagesEnd;
constexpr int kBarrierStart = (kPayload + 7) / 8 * 8;
constexpr int kSharedBytes = kBarrierStart + STAGES * 16 + 1024;  // the start is moved to a multiple of 1024

static_assert(kSharedBytes <= 227 * 1024 / BLOCKS - (BLOCKS > 1 ? 1024 : 0), "more shared memory than there is");

// Registers for each role: what a block has is dealt out again.
constexpr int kEvenRegisters = 65536 / (kThreads * BLOCKS) / 8 * 8;
constexpr int kProducerRegisters = 40;
constexpr int kLeftRegisters = (kEvenRegisters * (WARPGROUPS + 1) - kProducerRegisters) / WARPGROUPS / 8 * 8;
constexpr int kConsumerRegisters = kLeftRegisters > 240 ? 240 : kLeftRegisters;

struct Problem {
    const uint8_t* codes;    // [super rows][chunks][kChunkBytes]
    const uint8_t* scales;   // [super rows][groups][64]
    const uint8_t* zeros;    // the same, bytes
    const uint8_t* offsets;  // as scales
    const void* bias;        // [rows] or null
    void* output;            // [tokens][rows]
    int tokens, rows, chunks, groups;
    int row_tiles, token_tiles;
    float scale_factor;   // a power of two that brings scales into the inputs' type
    float output_factor;  // its inverse
};
