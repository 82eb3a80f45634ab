// Causal attention of several new tokens a sequence over the paged KV cache, on Hopper: products by wgmma.
//
// A block's tile has WARPGROUPS * 64 rows. As in attention_prefill.cu a row is one query head of one token, and the
// GROUP query heads of a KV head stand together. One warpgroup more brings keys and values, TILE tokens a stage: two of
// its warps fetch a page's 16 tokens in one copy that swizzles them for wgmma, or, from an 8-bit cache, all of them widen
// to fp16 what was fetched as it lies. Tokens that no page holds come as zeros.
//
// Each warpgroup has the products of its 64 rows: S = Q K^T with both factors in shared memory, O += P V with P in the
// registers where S was. S of the next tokens is started before P V of the last, so that the tensor cores work during
// the softmax; and warpgroups start their products in turn, so that one's softmax falls into the products of another.
// The walk goes from the newest tokens to the oldest: what needs a mask comes first.
//
// Macros: HEAD_DIM (64 or 128), GROUP, NUM_KV_HEADS, BLOCK_SIZE, KEY_FORMAT, VALUE_FORMAT (attention_cache.cuh),
// WARPGROUPS, TILE, STAGES, STAGED (fetched ahead of widening), and that of fused_elements.cuh.
#include "attention_cache.cuh"
#include "fused_elements.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/exponential.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/wgmma_transposed.cuh"

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
#define STAGED 3
#endif
#ifndef TURNS
#define TURNS 1
#endif

#define ALL_LANES 0xffffffffu
#define LOWEST __int_as_float(0xff800000)  // minus infinity

constexpr int CONSUMERS = WARPGROUPS * 128;
constexpr int THREADS = CONSUMERS + 128;
constexpr int ROWS = WARPGROUPS * 64;
constexpr int NUM_HEADS = GROUP * NUM_KV_HEADS;
constexpr int PAGE_TOKENS = 16;  // of one copy
constexpr int PAGES = TILE / PAGE_TOKENS;

// Shared memory. Queries: a warpgroup's 64 rows in halves of 64 channels, [halves][64][128 bytes]. Keys and values:
// [TILE / 8][halves][8 tokens][128 bytes].
constexpr int HALVES = HEAD_DIM / 64;
constexpr int QUERY_BYTES = 64 * HEAD_DIM * 2;  // of a warpgroup
constexpr int GROUP_BYTES = 8 * HEAD_DIM * 2;   // of eight tokens
constexpr int SIDE_BYTES = TILE * HEAD_DIM * 2;
constexpr int KEYS_PLACE = WARPGROUPS * QUERY_BYTES;
constexpr int VALUES_PLACE = KEYS_PLACE + STAGES * SIDE_BYTES;
// Codes of an 8-bit cache, [TILE][HEAD_DIM], before they are widened.
constexpr bool IS_WIDENED = item_bytes(KEY_FORMAT) == 1;
constexpr int STAGED_PLACE = VALUES_PLACE + STAGES * SIDE_BYTES;
constexpr int STAGED_BYTES = IS_WIDENED ? TILE * HEAD_DIM : 0;
constexpr int BARRIER_PLACE = STAGED_PLACE + STAGED * STAGED_BYTES;
constexpr int SHARED_BYTES = BARRIER_PLACE + (4 * STAGES + STAGED) * 8 + 1024;  // the start is moved to a multiple of 1024

constexpr int EVEN_REGISTERS = 65536 / THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = IS_WIDENED ? 56 : 32;
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
  float scale;                 // of the scores, times log2(e)
};

// What a block computes.
struct Task {
  int sequence, first_row, kv_head, query_begin, query_len, context_len, window;
  int first_position, num_rows;
  int lowest, highest;  // positions of the first and the last row
  int begin, end;       // tiles of the context

  __device__ __forceinline__ explicit Task(const Arguments& arguments) {
    sequence = arguments.tiles[2 * blockIdx.x];
    first_row = arguments.tiles[2 * blockIdx.x + 1];
    kv_head = blockIdx.y;
    query_begin = arguments.query_start[sequence];
    query_len = arguments.query_start[sequence + 1] - query_begin;
    context_len = arguments.context_lens[sequence];
    window = arguments.sliding_window > 0 ? arguments.sliding_window : 0x40000000;
    first_position = context_len - query_len;
    num_rows = query_len * GROUP;
    lowest = first_position + first_row / GROUP;
    highest = first_position + (min(first_row + ROWS, num_rows) - 1) / GROUP;
    begin = max(0, lowest - window + 1) / TILE;
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
  __device__ __forceinline__ uint32_t staged(int stage) const { return shared + BARRIER_PLACE + (4 * STAGES + stage) * 8; }
};

// A warp that fetches one side: each lane looks up and copies one page of a stage.
__device__ __forceinline__ void fetch_side(const Arguments& arguments, const TensorMap* map, const Task& task,
                                           const Barriers& barriers, int side) {
  const int lane = threadIdx.x % 32;
  const int* table = arguments.block_tables + static_cast<long long>(task.sequence) * arguments.table_stride;
  const auto look_up = [&](int tile) {
    const int token = tile * TILE + lane * PAGE_TOKENS;
    if (lane >= PAGES || token >= task.context_len || tile < task.begin) return -1;
    return table[token / BLOCK_SIZE];
  };
  const uint32_t place = barriers.shared + (side ? VALUES_PLACE : KEYS_PLACE);
  Ring<STAGES> ring;
  int page = look_up(task.end - 1);
  for (int tile = task.end - 1; tile >= task.begin; --tile, ring.advance()) {
    const int next_page = look_up(tile - 1);
    const uint32_t barrier = barriers.full(side, ring.stage);
    mbarrier_wait(barriers.empty(side, ring.stage), ring.phase ^ 1);
    if (lane == 0) mbarrier_arrive_expect(barrier, SIDE_BYTES);
    __syncwarp();
    if (lane < PAGES) {
      const int token = tile * TILE + lane * PAGE_TOKENS;
      const int group = page < 0 ? arguments.num_groups  // outside: zeros
                                 : ((page * NUM_KV_HEADS + task.kv_head) * BLOCK_SIZE + token % BLOCK_SIZE) / 8;
      tensor_load(place + ring.stage * SIDE_BYTES + lane * 2 * GROUP_BYTES, map, 0, 0, 0, group, barrier,
                  kCacheEvictNormal);
    }
    page = next_page;
  }
}

// The order in which consumers need sides: K0, K1, V0, K2, V1, ..., the tiles counted from the newest.
struct Part {
  int side, tile;
  __device__ __forceinline__ Part(const Task& task, int index) {
    const int last = 2 * (task.end - task.begin) - 1;
    side = index == last || (index > 0 && index % 2 == 0);
    tile = task.end - 1 - (index == last ? last / 2 : side ? index / 2 - 1 : (index + 1) / 2);
  }
};

// A warp fetches the codes of a part: each lane one page.
__device__ __forceinline__ void fetch_codes(const Arguments& arguments, const Task& task, const Barriers& barriers,
                                            const Part& part, int stage) {
  const int lane = threadIdx.x % 32, token = part.tile * TILE + lane * PAGE_TOKENS;
  const int num_tokens = min(task.context_len - part.tile * TILE, TILE);
  const int num_pages = (num_tokens + PAGE_TOKENS - 1) / PAGE_TOKENS;
  const uint32_t barrier = barriers.staged(stage);
  if (lane == 0) mbarrier_arrive_expect(barrier, num_pages * PAGE_TOKENS * HEAD_DIM);
  __syncwarp();
  if (lane >= num_pages) return;
  const int page = arguments.block_tables[static_cast<long long>(task.sequence) * arguments.table_stride + token / BLOCK_SIZE];
  const long long vector = (static_cast<long long>(page) * NUM_KV_HEADS + task.kv_head) * BLOCK_SIZE + token % BLOCK_SIZE;
  bulk_load(barriers.shared + STAGED_PLACE + stage * STAGED_BYTES + lane * PAGE_TOKENS * HEAD_DIM,
            (part.side ? arguments.values : arguments.keys) + vector * HEAD_DIM, PAGE_TOKENS * HEAD_DIM, barrier,
            kCacheEvictNormal);
}

// A warpgroup turns codes into swizzled rows of fp16; zeros behind the end of the context.
template <int FORMAT>
__device__ __forceinline__ void widen_codes(unsigned char* target, const unsigned char* source, int num_tokens) {
  constexpr int UNITS = HEAD_DIM / 16;  // of 16 codes
#pragma unroll 2
  for (int index = threadIdx.x % 128; index < TILE * UNITS; index += 128) {
    const int row = index / UNITS, unit = index % UNITS;
    Vector<unsigned, 4> codes = *reinterpret_cast<const Vector<unsigned, 4>*>(source + index * 16);
    if (row >= num_tokens) codes = {};
    unsigned char* line = target + row / 8 * GROUP_BYTES + unit / 4 * 1024 + row % 8 * 128;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int half = unit / 4 == 0 ? i : 1 - i;  // lanes of both halves of a row then meet no bank conflict
      Vector<unsigned, 4> wide;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const unsigned word = half ? codes.items[2 + j / 2] : codes.items[j / 2];
        if constexpr (item_bytes(FORMAT) == 1) wide.items[j] = decode_pair<FORMAT>(word >> j % 2 * 16);
      }
      *reinterpret_cast<Vector<unsigned, 4>*>(line + ((unit % 4 * 2 + half) ^ row % 8) * 16) = wide;
    }
  }
}

// The warpgroup that brings what consumers need from an 8-bit cache.
__device__ __forceinline__ void widen_sides(const Arguments& arguments, const Task& task, const Barriers& barriers,
                                            unsigned char* memory) {
  const int num_parts = 2 * (task.end - task.begin), warp = threadIdx.x % 128 / 32;
  if (warp == 0) {
    for (int index = 0; index < STAGED && index < num_parts; ++index)
      fetch_codes(arguments, task, barriers, Part(task, index), index);
  }
  Ring<STAGED> staged;
  Ring<STAGES> rings[2];
#pragma unroll 1
  for (int index = 0; index < num_parts; ++index, staged.advance()) {
    const Part part(task, index);
    const Ring<STAGES> ring = part.side ? rings[1] : rings[0];
    mbarrier_wait(barriers.staged(staged.stage), staged.phase);
    mbarrier_wait(barriers.empty(part.side, ring.stage), ring.phase ^ 1);
    const unsigned char* source = memory + STAGED_PLACE + staged.stage * STAGED_BYTES;
    unsigned char* target = memory + (part.side ? VALUES_PLACE : KEYS_PLACE) + ring.stage * SIDE_BYTES;
    const int num_tokens = task.context_len - part.tile * TILE;
    if constexpr (KEY_FORMAT == VALUE_FORMAT) {
      widen_codes<KEY_FORMAT>(target, source, num_tokens);
    } else if (part.side) {
      widen_codes<VALUE_FORMAT>(target, source, num_tokens);
    } else {
      widen_codes<KEY_FORMAT>(target, source, num_tokens);
    }
    fence_shared_to_async_proxy();
    named_barrier_sync(1 + 2 * WARPGROUPS, 128);  // all codes are read, all rows written
    if (threadIdx.x % 128 == 0) mbarrier_arrive(barriers.full(part.side, ring.stage));
    if (part.side) {
      rings[1].advance();
    } else {
      rings[0].advance();
    }
    if (warp == 0 && index + STAGED < num_parts)
      fetch_codes(arguments, task, barriers, Part(task, index + STAGED), staged.stage);
  }
}

// A warpgroup's 64 queries as rows of shared memory, zeros where there is none.
__device__ __forceinline__ void place_queries(const Arguments& arguments, const Task& task, unsigned char* target,
                                              int first_row) {
  constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes
#pragma unroll 4
  for (int index = threadIdx.x % 128; index < 64 * CHUNKS; index += 128) {
    const int row = index / CHUNKS, chunk = index % CHUNKS;
    float values[8] = {};
    if (first_row + row < task.num_rows) {
      const long long token = task.query_begin + (first_row + row) / GROUP;
      const long long head = token * NUM_HEADS + task.kv_head * GROUP + (first_row + row) % GROUP;
      load(arguments.queries + head * HEAD_DIM + chunk * 8, values);
    }
    Vector<unsigned, 4> packed;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed.items[i] = pack_pair<multiplies_bf16(KEY_FORMAT)>(values[2 * i], values[2 * i + 1]);
    *reinterpret_cast<Vector<unsigned, 4>*>(target + chunk / 8 * 8192 + row * 128 + (chunk % 8 ^ row % 8) * 16) = packed;
  }
}

__device__ __forceinline__ void start_scores(float (&scores)[TILE / 2], uint32_t queries, uint32_t keys) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const uint64_t left = wgmma_descriptor(queries + step / 4 * 8192) + step % 4 * 2;
    const uint64_t right = wgmma_descriptor_spaced(keys + step / 4 * 1024, GROUP_BYTES) + step % 4 * 2;
    if constexpr (multiplies_bf16(KEY_FORMAT)) {
      wgmma_bf16(scores, left, right, step > 0);
    } else {
      wgmma_f16(scores, left, right, step > 0);
    }
  }
  wgmma_commit();
}

__device__ __forceinline__ void start_mix(float (&result)[HEAD_DIM / 2], const uint32_t (&weights)[TILE / 16][4],
                                          uint32_t values) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < TILE / 16; ++step) {
    const uint64_t right = wgmma_descriptor_transposed(values + step * 2 * GROUP_BYTES, GROUP_BYTES, 1024);
    if constexpr (multiplies_bf16(VALUE_FORMAT)) {
      wgmma_bf16_transposed(result, weights[step], right);
    } else {
      wgmma_f16_transposed(result, weights[step], right);
    }
  }
  wgmma_commit();
}

template <int COUNT>
__device__ __forceinline__ void pin(float (&values)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) wgmma_pin(values[i]);
}

// Hides what a row must not see. `columns`: the two rows' positions, counted from the tile's first token and this lane's
// first column.
__device__ __forceinline__ void mask_scores(float (&scores)[TILE / 2], const int (&columns)[2], int window) {
#pragma unroll
  for (int i = 0; i < TILE / 2; ++i) {
    const int distance = columns[i / 2 % 2] - (i / 4 * 8 + i % 2);
    if (distance < 0 || distance >= window) scores[i] = LOWEST;
  }
}

// Running maxima and sums of this lane's two rows; sums are of the lane's own columns.
struct Softmax {
  float maxima[2], sums[2], corrections[2];

  // Turns scores into weights, and tells by what the result so far must be multiplied.
  __device__ __forceinline__ void update(float (&scores)[TILE / 2], float scale) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float own[2] = {maxima[row], LOWEST};
#pragma unroll
      for (int j = 0; j < TILE / 8; ++j) {
        own[0] = fmaxf(own[0], scores[4 * j + 2 * row]);
        own[1] = fmaxf(own[1], scores[4 * j + 2 * row + 1]);
      }
      float maximum = fmaxf(own[0], own[1]);
      maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 2));
      const float base = maximum == LOWEST ? 0.0f : maximum * scale;  // a row may see nothing of the walk so far
      corrections[row] = power_of_two(maxima[row] * scale - base);
      maxima[row] = maximum;
      float sum[2] = {sums[row] * corrections[row], 0.0f};
#pragma unroll
      for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[4 * j + 2 * row + i];
          score = power_of_two(score * scale - base);
          sum[i] += score;
        }
      }
      sums[row] = sum[0] + sum[1];
    }
  }

  __device__ __forceinline__ void rescale(float (&result)[HEAD_DIM / 2]) const {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) result[i] *= corrections[i / 2 % 2];
  }
};

// Weights as the left factor of O += P V: 16 tokens an entry.
__device__ __forceinline__ void pack_weights(const float (&scores)[TILE / 2], uint32_t (&weights)[TILE / 16][4]) {
#pragma unroll
  for (int i = 0; i < TILE / 4; ++i)
    weights[i / 4][i % 4] = pack_pair<multiplies_bf16(VALUE_FORMAT)>(scores[2 * i], scores[2 * i + 1]);
}

// A multiplying warpgroup.
struct Consumer {
  const Task& task;
  const Barriers& barriers;
  uint32_t queries, keys, values;  // addresses
  int warpgroup, lane;
  float scale;
  int positions[2];
  Ring<STAGES> key_ring, value_ring;
  Softmax softmax;
  float scores[TILE / 2];
  float result[HEAD_DIM / 2];
  uint32_t weights[TILE / 16][4];

  // Warpgroups begin their products in turn: barrier 1 + w is complete when w may.
  __device__ __forceinline__ void await_turn() const {
    if (TURNS && WARPGROUPS > 1) named_barrier_sync(1 + warpgroup, 256);
  }
  __device__ __forceinline__ void end_turn(int tile) const {
    if (TURNS && WARPGROUPS > 1 && (warpgroup != WARPGROUPS - 1 || tile != task.begin))
      named_barrier_arrive(1 + (warpgroup + 1) % WARPGROUPS, 256);
  }

  __device__ __forceinline__ void release(int side, Ring<STAGES>& ring) const {
    if (lane == 0) mbarrier_arrive(barriers.empty(side, ring.stage));
    ring.advance();
  }

  __device__ __forceinline__ void weigh(int tile) {
    const bool whole = (tile + 1) * TILE <= task.lowest + 1 && tile * TILE > task.highest - task.window;
    if (!whole) {
      const int first = tile * TILE + lane % 4 * 2;
      const int columns[2] = {positions[0] - first, positions[1] - first};
      mask_scores(scores, columns, task.window);
    }
    softmax.update(scores, scale);
  }

  // Values behind the end of the context may be anything, even no numbers.
  __device__ __forceinline__ void clear_end(unsigned char* memory) const {
    const int first = task.context_len - (task.end - 1) * TILE;  // in the tile
    if (IS_WIDENED || first >= TILE || first % PAGE_TOKENS == 0) return;
    const int rows = PAGE_TOKENS - first % PAGE_TOKENS;
    for (int index = threadIdx.x % 128; index < rows * HALVES * 8; index += 128) {
      const int row = first + index / (HALVES * 8), half = index / 8 % HALVES;
      const Vector<unsigned, 4> zeros = {};
      *reinterpret_cast<Vector<unsigned, 4>*>(memory + VALUES_PLACE + row / 8 * GROUP_BYTES + half * 1024 + row % 8 * 128 +
                                              index % 8 * 16) = zeros;
    }
    fence_shared_to_async_proxy();
    named_barrier_sync(1 + WARPGROUPS + warpgroup, 128);
  }

  __device__ __forceinline__ void run(unsigned char* memory) {
    int tile = task.end - 1;
    mbarrier_wait(barriers.full(0, key_ring.stage), key_ring.phase);
    await_turn();
    start_scores(scores, queries, keys + key_ring.stage * SIDE_BYTES);
    end_turn(tile);
    wgmma_wait<0>();
    pin(scores);
    release(0, key_ring);
    weigh(tile);
    mbarrier_wait(barriers.full(1, value_ring.stage), value_ring.phase);
    clear_end(memory);
    // The loop begins where the products of the last values end: a wait in its middle would be moved in front of the
    // softmax by the compiler, which sees no dependency.
#pragma unroll 1
    for (;;) {
      wgmma_wait<0>();
      pin(result);
      if (tile != task.end - 1) release(1, value_ring);
      softmax.rescale(result);
      pack_weights(scores, weights);
      if (--tile < task.begin) break;
      mbarrier_wait(barriers.full(0, key_ring.stage), key_ring.phase);
      await_turn();
      start_scores(scores, queries, keys + key_ring.stage * SIDE_BYTES);
      mbarrier_wait(barriers.full(1, value_ring.stage), value_ring.phase);
      start_mix(result, weights, values + value_ring.stage * SIDE_BYTES);
      end_turn(tile);
      wgmma_wait<1>();
      pin(scores);
      release(0, key_ring);
      weigh(tile);
    }
    mbarrier_wait(barriers.full(1, value_ring.stage), value_ring.phase);
    start_mix(result, weights, values + value_ring.stage * SIDE_BYTES);
    wgmma_wait<0>();
    pin(result);
  }
};

__device__ __forceinline__ void consume(const Arguments& arguments, const Task& task, const Barriers& barriers,
                                        unsigned char* memory) {
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int first_row = task.first_row + warpgroup * 64;
  place_queries(arguments, task, memory + warpgroup * QUERY_BYTES, first_row);
  fence_shared_to_async_proxy();
  named_barrier_sync(1 + WARPGROUPS + warpgroup, 128);

  // This lane's two rows: lane / 4 of its warp's 16, and that plus 8.
  const int row = first_row + threadIdx.x % 128 / 32 * 16 + lane / 4;
  Consumer consumer = {task, barriers,
                       barriers.shared + warpgroup * QUERY_BYTES, barriers.shared + KEYS_PLACE,
                       barriers.shared + VALUES_PLACE, warpgroup, lane,
                       arguments.scale * (scales_heads(KEY_FORMAT) ? arguments.key_scales[task.kv_head] : 1.0f)};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    consumer.positions[i] = task.first_position + min(row + i * 8, task.num_rows - 1) / GROUP;
    consumer.softmax.maxima[i] = LOWEST;
    consumer.softmax.sums[i] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i) consumer.result[i] = 0.0f;
  if (TURNS && WARPGROUPS > 1 && warpgroup == WARPGROUPS - 1) named_barrier_arrive(1, 256);
  consumer.run(memory);

  const float value_scale = scales_heads(VALUE_FORMAT) ? arguments.value_scales[task.kv_head] : 1.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = consumer.softmax.sums[i];
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    if (row + i * 8 >= task.num_rows) continue;
    const long long token = task.query_begin + (row + i * 8) / GROUP;
    const long long head = token * NUM_HEADS + task.kv_head * GROUP + (row + i * 8) % GROUP;
    const float factor = value_scale / sum;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j) {
      const float pair[2] = {consumer.result[4 * j + 2 * i] * factor, consumer.result[4 * j + 2 * i + 1] * factor};
      store(arguments.output + head * HEAD_DIM + j * 8 + lane % 4 * 2, pair);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_prefill_wgmma(const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values,
                            const __grid_constant__ Arguments arguments) {
  unsigned char* memory = dynamic_shared();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  const Barriers barriers = {shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int side = 0; side < 2; ++side) {
      for (int stage = 0; stage < STAGES; ++stage) {
        mbarrier_init(barriers.full(side, stage), 1);
        mbarrier_init(barriers.empty(side, stage), WARPGROUPS * 4);
      }
    }
    for (int stage = 0; stage < STAGED; ++stage) mbarrier_init(barriers.staged(stage), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  grid_dependency_launch();
  grid_dependency_wait();
  const Task task(arguments);
  if (threadIdx.x >= CONSUMERS) {
    warpgroup_give_registers<PRODUCER_REGISTERS>();
    const int warp = (threadIdx.x - CONSUMERS) / 32;
    if constexpr (IS_WIDENED) {
      widen_sides(arguments, task, barriers, memory);
    } else if (warp < 2) {
      fetch_side(arguments, warp ? &values : &keys, task, barriers, warp);
    }
  } else {
    warpgroup_take_registers<CONSUMER_REGISTERS>();
    consume(arguments, task, barriers, memory);
  }
}
