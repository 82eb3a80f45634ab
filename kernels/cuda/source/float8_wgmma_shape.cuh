// The stage of float8_wgmma.cu: macros, and what follows from them.
#pragma once

#include "types.cuh"
#include "wgmma_macros.cuh"

#ifndef SCALES
#define SCALES 0  // 0: of rows and tokens; 1: of blocks of weights, and of 128 columns of a token
#endif
#ifndef SCALE_ROWS
#define SCALE_ROWS 128  // rows of a block of weights
#endif

static_assert(SCALES == 0 || SCALE_ROWS % 64 == 0, "a tile of 64 rows has one scale");

constexpr int kInputBytes = TOKENS * 128;
constexpr int kCodeBytes = kRows * 128;
constexpr int kTokenScaleBytes = SCALES == 1 ? TOKENS * 4 : 0;
constexpr int kWeightBytes = kCodeBytes + (SCALES == 1 ? 1024 : 0);  // swizzled tiles begin at multiples of 1024
constexpr int kFetchers = 2;  // one for inputs, one for weights
constexpr int kExtraBytes = SCALES == 0 ? WARPGROUPS * TOKENS * 4 : 0;  // each warpgroup's scales of its tokens
