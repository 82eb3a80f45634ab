// What the warps of attention_prefill_wgmma.cu share: its macros, the layout of shared memory, and who does what when.
#pragma once

#include "attention_cache.cuh"
#include "fused_elements.cuh"
#include "ptx/barrier.cuh"

#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif
#ifndef TILE
#define TILE 128  // tokens
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef STAGED
#define STAGED 2
#endif

#define ALL_LANES 0xffffffffu
#define LOWEST __int_as_float(0xff800000)  // minus infinity

constexpr int CONSUMERS = WARPGROUPS * 128;
constexpr int THREADS = CONSUMERS + 128;
constexpr int ROWS = WARPGROUPS * 64;
constexpr int NUM_HEADS = GROUP * NUM_KV_HEADS;
constexpr int PAGE_TOKENS = 16;  // of one copy
constexpr int PAGES = TILE / PAGE_TOKENS;

// Shared memory. Queries, and later results: a warpgroup's 64 rows in halves of 64 channels, [halves][64][128 bytes].
// Keys and values: [TILE / 8][halves][8 tokens][128 bytes].
constexpr int HALVES = HEAD_DIM / 64;
constexpr int QUERY_BUFFERS = item_bytes(KEY_FORMAT) == 1 ? 1 : 2;
constexpr int QUERY_BYTES = 64 * HEAD_DIM * 2;  // of a warpgroup
constexpr int GROUP_BYTES = 8 * HEAD_DIM * 2;   // of eight tokens
constexpr int SIDE_BYTES = TILE * HEAD_DIM * 2;
constexpr int KEYS_PLACE = QUERY_BUFFERS * WARPGROUPS * QUERY_BYTES;
constexpr int VALUES_PLACE = KEYS_PLACE + STAGES * SIDE_BYTES;
// Codes of an 8-bit cache, [sides][STAGED][TILE][HEAD_DIM], before they are widened.
constexpr bool IS_WIDENED = item_bytes(KEY_FORMAT) == 1;
constexpr int STAGED_PLACE = VALUES_PLACE + STAGES * SIDE_BYTES;
constexpr int STAGED_BYTES = IS_WIDENED ? TILE * HEAD_DIM : 0;
constexpr int BARRIER_PLACE = STAGED_PLACE + 2 * STAGED * STAGED_BYTES;
constexpr int BARRIER_BYTES = (4 * STAGES + 2 * STAGED) * 8;
constexpr int SHARED_BYTES = BARRIER_PLACE + BARRIER_BYTES + 1024;  // the start is moved to a multiple of 1024

constexpr int EVEN_REGISTERS = 65536 / THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = IS_WIDENED ? 72 : 32;
constexpr int LEFT_REGISTERS = (EVEN_REGISTERS * (WARPGROUPS + 1) - PRODUCER_REGISTERS) / WARPGROUPS / 8 * 8;
constexpr int CONSUMER_REGISTERS = LEFT_REGISTERS > 240 ? 240 : LEFT_REGISTERS;

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "rows of shared memory have 64 channels");
static_assert(item_bytes(KEY_FORMAT) == item_bytes(VALUE_FORMAT), "keys and values take the same way");
static_assert(!scales_vectors(KEY_FORMAT) && !scales_vectors(VALUE_FORMAT), "a head's vectors share a scale");
static_assert(TILE % PAGE_TOKENS == 0 && BLOCK_SIZE % PAGE_TOKENS == 0, "whole pages");
static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than there is");

struct Arguments {
  const Element* queries;      // [tokens, NUM_HEADS, HEAD_DIM]
  const unsigned char* keys;   // [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
  const unsigned char* values;
  const float* key_scales;     // [NUM_KV_HEADS]
  const float* value_scales;
  const int* block_tables;     // [sequences, table_stride]
  const int* context_lens;     // [sequences]
  const int* query_start;      // [sequences + 1]
  const int* tiles;            // [tiles, 2]: sequence, first row
  Element* output;             // like queries
  int table_stride;
  int sliding_window;          // 0: none
  int num_groups;              // of eight tokens in the cache, over all pages and heads
  int num_tasks;               // tiles times KV heads
  float scale;                 // of the scores, times log2(e)
};

// The tasks of this block, in turns from both sides: those with much context stand first.
__device__ __forceinline__ int task_index(int round) {
  return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// One tile of one KV head.
struct Task {
  int sequence, first_row, kv_head, query_begin, context_len;
  int first_position, num_rows;
  int lowest, highest;  // positions of the first and the last row
  int begin, end;       // tiles of the context

  __device__ __forceinline__ Task(const Arguments& arguments, int index) {
    const int* tile = arguments.tiles + index / NUM_KV_HEADS * 2;
    sequence = tile[0];
    first_row = tile[1];
    kv_head = index % NUM_KV_HEADS;
    query_begin = arguments.query_start[sequence];
    context_len = arguments.context_lens[sequence];
    const int query_len = arguments.query_start[sequence + 1] - query_begin;
    first_position = context_len - query_len;
    num_rows = query_len * GROUP;
    lowest = first_position + first_row / GROUP;
    highest = first_position + (min(first_row + ROWS, num_rows) - 1) / GROUP;
    const int window = arguments.sliding_window;
    begin = window > 0 ? max(0, lowest - window + 1) / TILE : 0;
    end = (highest + TILE) / TILE;
  }
};

// A ring of stages: which one comes next, and in which phase its barriers are.
template <int SIZE>
struct Ring {
  int stage = 0;
  unsigned phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == SIZE) stage = 0, phase ^= 1;
  }
};

// Barriers of the stages of keys (side 0) and values (side 1), and of what is fetched before it is widened.
struct Barriers {
  uint32_t shared;
  __device__ __forceinline__ uint32_t full(int side, int stage) const {
    return shared + BARRIER_PLACE + ((side * STAGES + stage) * 2) * 8;
  }
  __device__ __forceinline__ uint32_t empty(int side, int stage) const { return full(side, stage) + 8; }
  __device__ __forceinline__ uint32_t staged(int side, int stage) const {
    return shared + BARRIER_PLACE + (4 * STAGES + side * STAGED + stage) * 8;
  }
};
