// The shape of integer_decode.cu: macros, what follows from them, and its arguments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "grouped_tiles.cuh"
#include "stored_scales.cuh"
#include "types.cuh"

#ifndef CODE_BITS
#define CODE_BITS 4
#endif
#ifndef GROUP_SIZE  // packed columns that share a scale
#define GROUP_SIZE 128
#endif
#ifndef ZERO_KIND  // 0: symmetric, 1: zero points, 2: offsets
#define ZERO_KIND 0
#endif
#ifndef BF16_INPUTS  // x and y: 1 bfloat16, 0 float16
#define BF16_INPUTS 1
#endif
#ifndef SCALE_TYPE  // of scales and offsets, as stored_scales.cuh has them
#define SCALE_TYPE 1
#endif
#ifndef EXTRAS  // the kernel also takes supers, and a factor of the whole weight
#define EXTRAS 0
#endif
#ifndef OUT_FEATURES
#define OUT_FEATURES 4096
#endif
#ifndef IN_FEATURES
#define IN_FEATURES 4096
#endif
#ifndef PADDED_COLUMNS
#define PADDED_COLUMNS 4096
#endif
#ifndef HAS_COLUMNS  // x is gathered by the packed columns' inputs
#define HAS_COLUMNS 0
#endif
#ifndef HAS_BIAS
#define HAS_BIAS 0
#endif
#ifndef TOKEN_TILES  // of 8 tokens
#define TOKEN_TILES 1
#endif
#ifndef NUM_CLUSTERS
#define NUM_CLUSTERS 32
#endif
#ifndef CLUSTER
#if __CUDA_ARCH__ >= 900
#define CLUSTER 4
#else
#define CLUSTER 1
#endif
#endif
#ifndef WARP_ROWS
#define WARP_ROWS 2
#endif
#ifndef WARP_COLUMNS
#define WARP_COLUMNS 4
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef EARLY_STAGES  // loaded before this kernel waits for the one in front of it; the others after x
#define EARLY_STAGES STAGES
#endif
#ifndef UNIT_CHUNKS  // chunks of 64 columns in a stage
#define UNIT_CHUNKS 2
#endif
#ifndef PART_TILES  // tiles of 16 rows that a warp works on: 4 (a super row) or 2
#define PART_TILES 4
#endif
#ifndef BULK_INPUT  // x comes by the bulk copy engine (sm_90), and more of the weight is asked for before it is there
#define BULK_INPUT 0
#endif
#ifndef PHASES  // parts in which a block's slice of x is held
#define PHASES 1
#endif
#ifndef BLOCKS_PER_MULTIPROCESSOR
#define BLOCKS_PER_MULTIPROCESSOR 2
#endif

constexpr bool kBf16 = BF16_INPUTS != 0;
constexpr int kWarps = WARP_ROWS * WARP_COLUMNS, kThreads = kWarps * 32;
constexpr int kParts = (OUT_FEATURES + 63) / 64 * (4 / PART_TILES), kPartRows = PART_TILES * 16;
constexpr int kChunkBytes = 64 * 8 * CODE_BITS, kTileBytes = kChunkBytes / 4;
constexpr int kUnitColumns = UNIT_CHUNKS * 64;
constexpr int kUnits = PADDED_COLUMNS / kUnitColumns;
constexpr int kSplits = CLUSTER * WARP_COLUMNS;
constexpr int kMaxUnits = (kUnits + kSplits - 1) / kSplits;  // of a warp in a super row
constexpr int kTurns = (kParts + NUM_CLUSTERS - 1) / NUM_CLUSTERS;
constexpr int kPasses = (kTurns + WARP_ROWS - 1) / WARP_ROWS;

// A weight with one scale a row and no zero points is scaled at the end.
constexpr bool kRowScales = GROUP_SIZE == PADDED_COLUMNS && ZERO_KIND == 0;
constexpr int kGroups = (PADDED_COLUMNS + GROUP_SIZE - 1) / GROUP_SIZE;
constexpr int kUnitGroups = GROUP_SIZE < kUnitColumns ? kUnitColumns / GROUP_SIZE : 1;
constexpr int kGroupSteps = (GROUP_SIZE < kUnitColumns ? GROUP_SIZE : kUnitColumns) / 16;
constexpr int kScaleSize = stored_bytes(SCALE_TYPE);
constexpr int kPieceBytes = PART_TILES * kTileBytes;  // of a chunk
constexpr int kCodeBytes = UNIT_CHUNKS * kPieceBytes;
constexpr int kScaleBytes = kRowScales ? 0 : kUnitGroups * 64 * kScaleSize;
constexpr int kZeroBytes = ZERO_KIND == 0 ? 0 : kUnitGroups * 64 * (ZERO_KIND == 1 ? 1 : kScaleSize);
constexpr bool kSupers = SCALE_TYPE == kScaleSuper;  // fp16 numbers that 256 columns share: of scales, then of offsets
constexpr int kSuperBytes = kSupers ? (ZERO_KIND == 2 ? 2 : 1) * 64 * 2 : 0;
constexpr int kStageBytes = kCodeBytes + kScaleBytes + kZeroBytes + kSuperBytes;

// Shared memory: rings | partial sums of warps | partial sums of blocks | x | barriers.
constexpr int kMaxTokens = TOKEN_TILES * 8;
constexpr int kRingBytes = kWarps * STAGES * kStageBytes;
constexpr int kPartialStride = kPartRows + 4;  // floats between tokens of a warp's partial sums: no bank conflicts
constexpr int kPartialBytes = kWarps * kMaxTokens * kPartialStride * 4;
constexpr bool kPartialsInRing = kPasses == 1 && kPartialBytes <= kRingBytes;
constexpr int kOwnRows = WARP_ROWS * kPartRows / CLUSTER;
constexpr int kReceivedFloats = CLUSTER > 1 ? kMaxTokens * WARP_ROWS * kPartRows : 0;  // of all blocks
constexpr int kReceivedBuffers = kPasses > 1 ? 2 : 1;
constexpr int kPhaseUnits = (kMaxUnits + PHASES - 1) / PHASES;
constexpr int kSegment = kPhaseUnits * kUnitColumns;  // columns of x that a warp needs in a phase
constexpr int kInputStride = WARP_COLUMNS * kSegment * 2 + 16;  // bytes
constexpr int kReceivedOffset = kRingBytes + (kPartialsInRing ? 0 : kPartialBytes);
constexpr int kBarrierOffset = kReceivedOffset + kReceivedFloats * kReceivedBuffers * 4;
constexpr int kReceivedBarrier = kWarps * STAGES;
constexpr int kInputBarrier = kReceivedBarrier + 2;  // one for each part of the columns
constexpr int kInputOffset = kBarrierOffset + ((kInputBarrier + WARP_COLUMNS) * 8 + 127) / 128 * 128;
#ifdef INPUT_OFFSET  // what the host takes them for
static_assert(INPUT_OFFSET == kInputOffset && INPUT_STRIDE == kInputStride, "host and kernel agree on shared memory");
#endif

static_assert(CODE_BITS == 2 || CODE_BITS == 3 || CODE_BITS == 4 || CODE_BITS == 5 || CODE_BITS == 6 || CODE_BITS == 8,
              "bits of a stored code");
static_assert(PADDED_COLUMNS % 128 == 0 && IN_FEATURES <= PADDED_COLUMNS * (HAS_COLUMNS ? 16 : 1), "padded columns");
static_assert(GROUP_SIZE % 16 == 0 && (GROUP_SIZE % kUnitColumns == 0 || kUnitColumns % GROUP_SIZE == 0),
              "groups and stages must fit");
static_assert(PADDED_COLUMNS % kUnitColumns == 0, "whole stages");
static_assert(!kSupers || (EXTRAS && 256 % kUnitColumns == 0 && PADDED_COLUMNS % 256 == 0), "a stage has one line of supers");
static_assert(EARLY_STAGES >= 1 && EARLY_STAGES <= STAGES, "some stages are loaded early");
static_assert(PART_TILES == 2 || PART_TILES == 4, "tiles of a warp");
static_assert(!BULK_INPUT || (!HAS_COLUMNS && !GROUPED && IN_FEATURES == PADDED_COLUMNS && PHASES == 1), "x as it is");
static_assert(WARP_ROWS * kPartRows % CLUSTER == 0 && kOwnRows % 4 == 0, "each block of a cluster owns as many rows");

using Element = uint16_t;

__device__ __forceinline__ int split_start(int split) { return static_cast<int>(static_cast<int64_t>(split) * kUnits / kSplits); }

// The rows that a warp works on in a pass, in units of kPartRows; kParts or more: none.
__device__ __forceinline__ int part_of(int cluster, int pass, int row_part) {
    return (pass * WARP_ROWS + row_part) * NUM_CLUSTERS + cluster;
}

__device__ __forceinline__ float to_float(Element value) {
    if (kBf16) return __uint_as_float(static_cast<uint32_t>(value) << 16);
    return __half2float(__ushort_as_half(value));
}

__device__ __forceinline__ Element from_float(float value) {
    if (kBf16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
    return __half_as_ushort(__float2half_rn(value));
}

struct Weight {
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* zeros;  // zero points or offsets
    const uint8_t* supers;  // [super rows][256 columns][scales, offsets][64]
    float factor;           // of all outputs

    // The weight of an expert; those of all stand one after another.
    __device__ __forceinline__ Weight of(int expert) const {
        const int64_t super_rows = static_cast<int64_t>(expert) * ((OUT_FEATURES + 63) / 64), values = super_rows * kGroups * 64;
        return {codes + super_rows * (PADDED_COLUMNS / 64) * kChunkBytes, scales + values * kScaleSize,
                zeros + values * (ZERO_KIND == 1 ? 1 : kScaleSize), nullptr, factor};
    }
};

// Rows of x; with GROUPED those that `sources` names, if there are any.
struct Inputs {
    const Element* x;
#if GROUPED
    const int32_t* sources;
    __device__ __forceinline__ const Element* row(int token) const {
        return x + static_cast<int64_t>(sources == nullptr ? token : sources[token]) * IN_FEATURES;
    }
#else
    __device__ __forceinline__ const Element* row(int token) const { return x + static_cast<int64_t>(token) * IN_FEATURES; }
#endif
};
