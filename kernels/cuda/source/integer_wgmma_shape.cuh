// The stage of integer_wgmma.cu: macros, and what follows from them.
#pragma once

#include "integer_stage.cuh"
#include "wgmma_macros.cuh"

#ifndef STEPS
#define STEPS 1  // matrix steps of 16 columns that are converted and issued together: 1 or 2
#endif
// Few tokens: scaling the sums of a group is less work than scaling its codes, and exact.
#define SUM_GROUPS (TOKENS <= 64 && GROUP >= 64 && ZEROS != 2 && SCALE_TYPE != 5)
static_assert(STEPS == 1 || STEPS == 2, "the fragments are buffered twice in a chunk of four steps");

constexpr int kInputBytes = CHUNKS * TOKENS * 128;
constexpr int kWeightBytes = kSuperRows * kSuperRowBytes;
constexpr int kWeightFetchers = kSuperRows < 3 ? kSuperRows : 3;
constexpr int kFetchers = 1 + kWeightFetchers;  // one for the inputs
constexpr int kExtraBytes = 0;
