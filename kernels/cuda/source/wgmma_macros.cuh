// The macros that every wgmma kernel takes, and what follows from them alone.
#pragma once

#ifndef BFLOAT
#define BFLOAT 1  // the 16-bit type is bf16, else fp16
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
#ifndef STAGES
#define STAGES 4
#endif
#ifndef SPLIT
#define SPLIT 1  // blocks of a cluster that share the columns of a tile
#endif
#ifndef MULTICAST
#define MULTICAST 1  // blocks of a cluster that share their tokens
#endif
#ifndef PERSISTENT
#define PERSISTENT 0  // blocks take tile after tile
#endif
#ifndef TOKEN_GROUP
#define TOKEN_GROUP 4  // tiles of tokens that are worked on side by side, so that L2 holds their inputs
#endif
#ifndef LEAD
#define LEAD 0  // steps by which the first of two warpgroups is ahead: one multiplies while the other stores
#endif
#ifndef BLOCKS
#define BLOCKS 1  // on a multiprocessor
#endif

static_assert(SPLIT == 1 || !PERSISTENT, "a split tile is summed up once");
static_assert(TOKENS % 16 == 0 && TOKENS % (8 * MULTICAST) == 0 && TOKENS <= 256, "whole swizzled rows");
static_assert(LEAD == 0 || (WARPGROUPS == 2 && PERSISTENT && LEAD < STAGES), "both are in the same ring of stages");
static_assert(TOKENS % SPLIT == 0, "each block of a cluster sums up as many tokens");
static_assert(SPLIT * MULTICAST <= 8, "the largest cluster that every GPU can place");

constexpr bool kIsBf16 = BFLOAT;
constexpr int kSuperRows = WARPGROUPS * TILES;
constexpr int kRows = kSuperRows * 64;
constexpr int kCluster = SPLIT * MULTICAST;
constexpr int kConsumers = WARPGROUPS * 128;
constexpr int kThreads = kConsumers + 128;
constexpr int kAccumulators = TOKENS / 2;

// Registers for each role: what a block has is dealt out again.
constexpr int kEvenRegisters = 65536 / (kThreads * BLOCKS) / 8 * 8;
constexpr int kProducerRegisters = TOKENS * TILES <= 64 && kEvenRegisters > 64 ? 56 : 40;
constexpr int kLeftRegisters = (kEvenRegisters * (WARPGROUPS + 1) - kProducerRegisters) / WARPGROUPS / 8 * 8;
constexpr int kConsumerRegisters = kLeftRegisters > 240 ? 240 : kLeftRegisters;
