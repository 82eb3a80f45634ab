// The stage of integer_wgmma.cu: macros, and what follows from them.
#pragma once

#include "types.cuh"
#include "wgmma_macros.cuh"

#ifndef CODE_BITS
#define CODE_BITS 4  // of a stored code: 2, 3, 4, 8
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
#ifndef STEPS
#define STEPS 1  // matrix steps of 16 columns that are converted and issued together: 1 or 2
#endif

static_assert(STEPS == 1 || STEPS == 2, "the fragments are buffered twice in a chunk of four steps");
static_assert(CHUNKS == 1 || CHUNKS == 2, "columns are padded to 128");
static_assert(GROUP == 0 || GROUP % 128 == 0 || GROUP == 64 || GROUP == 32 || GROUP == 16, "groups of whole steps");

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
