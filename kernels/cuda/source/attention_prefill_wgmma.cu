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
// A block takes tile after tile: while it ends one, the keys and values of the next are fetched already, and its queries
// since it began the last.
//
// Macros: HEAD_DIM (64 or 128), GROUP, NUM_KV_HEADS, BLOCK_SIZE, KEY_FORMAT, VALUE_FORMAT (attention_cache.cuh),
// WARPGROUPS, TILE, STAGES, STAGED (fetched ahead of widening), and that of fused_elements.cuh.
#include "attention_cache.cuh"
#include "fused_elements.cuh"
#include "ptx/async_copy.cuh"
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

// Shared memory. Queries, and later results: a warpgroup's 64 rows in halves of 64 channels, [halves][64][128 bytes]. Keys
// and values: [TILE / 8][halves][8 tokens][128 bytes].
constexpr int HALVES = HEAD_DIM / 64;
constexpr int QUERY_BUFFERS = item_bytes(KEY_FORMAT) == 1 ? 1 : 2;
constexpr int QUERY_BYTES = 64 * HEAD_DIM * 2;  // of a warpgroup
constexpr int GROUP_BYTES = 8 * HEAD_DIM * 2;   // of eight tokens
constexpr int SIDE_BYTES = TILE * HEAD_DIM * 2;
constexpr int KEYS_PLACE = QUERY_BUFFERS * WARPGROUPS * QUERY_BYTES;
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
  __device__ __forceinline__ uint32_t staged(int stage) const { return shared + BARRIER_PLACE + (4 * STAGES + stage) * 8; }
};

// A warp that fetches one side: each lane looks up and copies one page of a stage.
__device__ __forceinline__ void fetch_side(const Arguments& arguments, const TensorMap* map, const Barriers& barriers,
                                           int side) {
  const int lane = threadIdx.x % 32;
  const uint32_t place = barriers.shared + (side ? VALUES_PLACE : KEYS_PLACE);
  Ring<STAGES> ring;
#pragma unroll 1
  for (int round = 0; task_index(round) < arguments.num_tasks; ++round) {
    const Task task(arguments, task_index(round));
    const int* table = arguments.block_tables + static_cast<long long>(task.sequence) * arguments.table_stride;
    const auto look_up = [&](int tile) {
      const int token = tile * TILE + lane * PAGE_TOKENS;
      if (lane >= PAGES || token >= task.context_len || tile < task.begin) return -1;
      return table[token / BLOCK_SIZE];
    };
    int page = look_up(task.end - 1);
#pragma unroll 1
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
}

// A walk over what consumers need of an 8-bit cache, task by task: K0, K1, V0, K2, V1, ..., tiles counted from the newest.
struct Parts {
  const Arguments& arguments;
  int round = 0, index = 0;
  Task task;

  __device__ __forceinline__ explicit Parts(const Arguments& own)
      : arguments(own), task(own, task_index(0)) {}
  __device__ __forceinline__ bool more() const { return task_index(round) < arguments.num_tasks; }
  __device__ __forceinline__ void next() {
    if (++index < 2 * (task.end - task.begin)) return;
    index = 0;
    ++round;
    if (more()) task = Task(arguments, task_index(round));
  }
  __device__ __forceinline__ bool is_last() const { return index == 2 * (task.end - task.begin) - 1; }
  __device__ __forceinline__ int side() const { return is_last() || (index > 0 && index % 2 == 0); }
  __device__ __forceinline__ int tile() const {
    return task.end - 1 - (is_last() ? index / 2 : side() ? index / 2 - 1 : (index + 1) / 2);
  }
  __device__ __forceinline__ int num_tokens() const { return min(task.context_len - tile() * TILE, TILE); }
};

// A warp fetches the codes of a part: each lane one page.
__device__ __forceinline__ void fetch_codes(const Arguments& arguments, const Barriers& barriers, const Parts& part,
                                            int stage) {
  const int lane = threadIdx.x % 32, token = part.tile() * TILE + lane * PAGE_TOKENS;
  const int num_pages = (part.num_tokens() + PAGE_TOKENS - 1) / PAGE_TOKENS;
  const uint32_t barrier = barriers.staged(stage);
  if (lane == 0) mbarrier_arrive_expect(barrier, num_pages * PAGE_TOKENS * HEAD_DIM);
  __syncwarp();
  if (lane >= num_pages) return;
  const long long entry = static_cast<long long>(part.task.sequence) * arguments.table_stride + token / BLOCK_SIZE;
  const long long page = arguments.block_tables[entry];
  const long long vector = (page * NUM_KV_HEADS + part.task.kv_head) * BLOCK_SIZE + token % BLOCK_SIZE;
  bulk_load(barriers.shared + STAGED_PLACE + stage * STAGED_BYTES + lane * PAGE_TOKENS * HEAD_DIM,
            (part.side() ? arguments.values : arguments.keys) + vector * HEAD_DIM, PAGE_TOKENS * HEAD_DIM, barrier,
            kCacheEvictNormal);
}

// A warpgroup turns codes into swizzled rows of fp16; zeros behind the end of the context.
template <int FORMAT>
__device__ __forceinline__ void widen_codes(unsigned char* target, const unsigned char* source, int num_tokens) {
  constexpr int UNITS = HEAD_DIM / 16;  // of 16 codes in a row
  constexpr int PASS_ROWS = 128 / UNITS, PASSES = TILE / PASS_ROWS;
  constexpr int BATCH = PASSES % 4 == 0 ? 4 : PASSES % 3 == 0 ? 3 : PASSES % 2 == 0 ? 2 : 1;  // loads in flight
  static_assert(TILE % PASS_ROWS == 0 && PASS_ROWS % 8 == 0, "a thread's rows have the same place in their groups");
  const int thread = threadIdx.x % 128, row = thread / UNITS, unit = thread % UNITS;
  const int first = unit / 4 == 0 ? 0 : 1;  // lanes of both halves of a row then meet no bank conflict
  unsigned char* line = target + row / 8 * GROUP_BYTES + unit / 4 * 1024 + row % 8 * 128;
  unsigned char* const places[2] = {line + ((unit % 4 * 2 + first) ^ row % 8) * 16,
                                    line + ((unit % 4 * 2 + 1 - first) ^ row % 8) * 16};
  source += thread * 16;
#pragma unroll 1
  for (int pass = 0; pass < PASSES; pass += BATCH) {
    Vector<unsigned, 4> codes[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      codes[i] = *reinterpret_cast<const Vector<unsigned, 4>*>(source + (pass + i) * 2048);
      if (row + (pass + i) * PASS_ROWS >= num_tokens) codes[i] = {};
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector<unsigned, 4> wide;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const unsigned word = half == first ? codes[i].items[j / 2] : codes[i].items[2 + j / 2];
          if constexpr (item_bytes(FORMAT) == 1) wide.items[j] = decode_pair<FORMAT>(word >> j % 2 * 16);
        }
        *reinterpret_cast<Vector<unsigned, 4>*>(places[half] + (pass + i) * (PASS_ROWS / 8) * GROUP_BYTES) = wide;
      }
    }
  }
}

// The warpgroup that brings what consumers need from an 8-bit cache.
__device__ __forceinline__ void widen_sides(const Arguments& arguments, const Barriers& barriers, unsigned char* memory) {
  const bool is_fetcher = threadIdx.x % 128 < 32;
  Parts part(arguments), ahead(arguments);
  Ring<STAGED> staged;
  Ring<STAGES> rings[2];
  for (int stage = 0; is_fetcher && stage < STAGED && ahead.more(); ++stage, ahead.next())
    fetch_codes(arguments, barriers, ahead, stage);
#pragma unroll 1
  for (; part.more(); part.next(), staged.advance()) {
    const int side = part.side(), num_tokens = part.num_tokens();
    const Ring<STAGES> ring = side ? rings[1] : rings[0];
    mbarrier_wait(barriers.staged(staged.stage), staged.phase);
    mbarrier_wait(barriers.empty(side, ring.stage), ring.phase ^ 1);
    const unsigned char* source = memory + STAGED_PLACE + staged.stage * STAGED_BYTES;
    unsigned char* target = memory + (side ? VALUES_PLACE : KEYS_PLACE) + ring.stage * SIDE_BYTES;
    if constexpr (KEY_FORMAT == VALUE_FORMAT) {
      widen_codes<KEY_FORMAT>(target, source, num_tokens);
    } else if (side) {
      widen_codes<VALUE_FORMAT>(target, source, num_tokens);
    } else {
      widen_codes<KEY_FORMAT>(target, source, num_tokens);
    }
    fence_shared_to_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barriers.full(side, ring.stage));
    if (side) {
      rings[1].advance();
    } else {
      rings[0].advance();
    }
    named_barrier_sync(1 + 2 * WARPGROUPS, 128);  // all codes are read
    if (is_fetcher && ahead.more()) {
      fetch_codes(arguments, barriers, ahead, staged.stage);
      ahead.next();
    }
  }
}

// The vector of queries or results that belongs to a row of the task.
__device__ __forceinline__ long long vector_of(const Task& task, int row) {
  const long long token = task.query_begin + row / GROUP;
  return token * NUM_HEADS + task.kv_head * GROUP + row % GROUP;
}

// Where a chunk of 16 bytes of a row of queries or results lies, behind the warpgroup's buffer.
__device__ __forceinline__ int chunk_place(int row, int chunk) {
  return chunk / 8 * 8192 + row * 128 + (chunk % 8 ^ row % 8) * 16;
}

// Brings a warpgroup's 64 queries to shared memory, zeros where there is none; end_queries waits for them.
__device__ __forceinline__ void begin_queries(const Arguments& arguments, const Task& task, unsigned char* target,
                                              int warpgroup) {
  constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes
  const int first_row = task.first_row + warpgroup * 64;
#pragma unroll 4
  for (int index = threadIdx.x % 128; index < 64 * CHUNKS; index += 128) {
    const int row = index / CHUNKS, chunk = index % CHUNKS;
    const bool exists = first_row + row < task.num_rows;
    const Element* source =
        arguments.queries + (exists ? vector_of(task, first_row + row) * HEAD_DIM + chunk * 8 : 0);
    unsigned char* place = target + chunk_place(row, chunk);
    if constexpr (multiplies_bf16(KEY_FORMAT) == ELEMENT_IS_BF16) {
      copy_async<16>(place, source, exists);
    } else {
      float values[8] = {};
      if (exists) load(source, values);
      Vector<unsigned, 4> packed;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        packed.items[i] = pack_pair<multiplies_bf16(KEY_FORMAT)>(values[2 * i], values[2 * i + 1]);
      *reinterpret_cast<Vector<unsigned, 4>*>(place) = packed;
    }
  }
  copy_async_commit();
}

__device__ __forceinline__ void end_queries(int warpgroup) {
  copy_async_wait<0>();
  fence_shared_to_async_proxy();
  named_barrier_sync(1 + WARPGROUPS + warpgroup, 128);
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
  const Barriers& barriers;
  uint32_t keys, values;  // addresses
  int warpgroup, lane, window;
  float scale;
  Ring<STAGES> key_ring, value_ring;
  uint32_t queries;
  int positions[2];
  bool is_last_task;
  Softmax softmax;
  float scores[TILE / 2];
  float result[HEAD_DIM / 2];
  uint32_t weights[TILE / 16][4];

  // Warpgroups begin their products in turn: barrier 1 + w is complete when w may.
  __device__ __forceinline__ void await_turn() const {
    if (TURNS && WARPGROUPS > 1) named_barrier_sync(1 + warpgroup, 256);
  }
  __device__ __forceinline__ void end_turn(bool is_last_tile) const {
    const bool is_last = is_last_task && is_last_tile && warpgroup == WARPGROUPS - 1;  // nobody's turn comes after it
    if (TURNS && WARPGROUPS > 1 && !is_last) named_barrier_arrive(1 + (warpgroup + 1) % WARPGROUPS, 256);
  }

  __device__ __forceinline__ void release(int side, Ring<STAGES>& ring) const {
    if (lane == 0) mbarrier_arrive(barriers.empty(side, ring.stage));
    ring.advance();
  }

  __device__ __forceinline__ void weigh(const Task& task, int tile) {
    const bool whole = (tile + 1) * TILE <= task.lowest + 1 && tile * TILE > task.highest - window;
    if (!whole) {
      const int first = tile * TILE + lane % 4 * 2;
      const int columns[2] = {positions[0] - first, positions[1] - first};
      mask_scores(scores, columns, window);
    }
    softmax.update(scores, scale);
  }

  // Values behind the end of the context may be anything, even no numbers.
  __device__ __forceinline__ void clear_end(const Task& task, unsigned char* memory) const {
    const int first = task.context_len - (task.end - 1) * TILE;  // in the tile
    if (IS_WIDENED || first >= TILE || first % PAGE_TOKENS == 0) return;
    const int rows = PAGE_TOKENS - first % PAGE_TOKENS;
    for (int index = threadIdx.x % 128; index < rows * HALVES * 8; index += 128) {
      const int row = first + index / (HALVES * 8), half = index / 8 % HALVES;
      const Vector<unsigned, 4> zeros = {};
      unsigned char* line = memory + VALUES_PLACE + value_ring.stage * SIDE_BYTES + row / 8 * GROUP_BYTES + half * 1024;
      *reinterpret_cast<Vector<unsigned, 4>*>(line + row % 8 * 128 + index % 8 * 16) = zeros;
    }
    fence_shared_to_async_proxy();
    named_barrier_sync(1 + WARPGROUPS + warpgroup, 128);
  }

  // The sums of a task: `result`, and `softmax.sums` of each lane.
  __device__ __forceinline__ void run(const Task& task, unsigned char* memory) {
    const int row = task.first_row + warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // and that plus 8
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      positions[i] = task.first_position + min(row + i * 8, task.num_rows - 1) / GROUP;
      softmax.maxima[i] = LOWEST;
      softmax.sums[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) result[i] = 0.0f;
    int tile = task.end - 1;
    mbarrier_wait(barriers.full(0, key_ring.stage), key_ring.phase);
    await_turn();
    start_scores(scores, queries, keys + key_ring.stage * SIDE_BYTES);
    end_turn(tile == task.begin);
    wgmma_wait<0>();
    pin(scores);
    release(0, key_ring);
    weigh(task, tile);
    mbarrier_wait(barriers.full(1, value_ring.stage), value_ring.phase);
    clear_end(task, memory);
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
      end_turn(tile == task.begin);
      wgmma_wait<1>();
      pin(scores);
      release(0, key_ring);
      weigh(task, tile);
    }
    mbarrier_wait(barriers.full(1, value_ring.stage), value_ring.phase);
    start_mix(result, weights, values + value_ring.stage * SIDE_BYTES);
    wgmma_wait<0>();
    pin(result);
    release(1, value_ring);
  }

  // The results of a task, by way of the memory of its queries.
  __device__ __forceinline__ void put_out(const Arguments& arguments, const Task& task, unsigned char* buffer) const {
    const float value_scale = scales_heads(VALUE_FORMAT) ? arguments.value_scales[task.kv_head] : 1.0f;
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = softmax.sums[i];
      sum += __shfl_xor_sync(ALL_LANES, sum, 1);
      sum += __shfl_xor_sync(ALL_LANES, sum, 2);
      const float factor = value_scale / sum;
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; ++j) {
        const float pair[2] = {result[4 * j + 2 * i] * factor, result[4 * j + 2 * i + 1] * factor};
        store(reinterpret_cast<Element*>(buffer + chunk_place(row + i * 8, j) + lane % 4 * 4), pair);
      }
    }
    named_barrier_sync(1 + WARPGROUPS + warpgroup, 128);
    constexpr int CHUNKS = HEAD_DIM / 8;
    const int first_row = task.first_row + warpgroup * 64;
#pragma unroll 4
    for (int index = threadIdx.x % 128; index < 64 * CHUNKS; index += 128) {
      const int own = index / CHUNKS, chunk = index % CHUNKS;
      if (first_row + own >= task.num_rows) break;
      *reinterpret_cast<Vector<Element, 8>*>(arguments.output + vector_of(task, first_row + own) * HEAD_DIM + chunk * 8) =
          *reinterpret_cast<const Vector<Element, 8>*>(buffer + chunk_place(own, chunk));
    }
  }
};

__device__ __forceinline__ void consume(const Arguments& arguments, const Barriers& barriers, unsigned char* memory) {
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  const auto buffer_place = [&](int round) {
    return (round % QUERY_BUFFERS * WARPGROUPS + warpgroup) * QUERY_BYTES;
  };
  Consumer consumer = {barriers, barriers.shared + KEYS_PLACE, barriers.shared + VALUES_PLACE, warpgroup, lane,
                       arguments.sliding_window > 0 ? arguments.sliding_window : 0x40000000};
  if (TURNS && WARPGROUPS > 1 && warpgroup == WARPGROUPS - 1) named_barrier_arrive(1, 256);
  if (QUERY_BUFFERS == 2) begin_queries(arguments, Task(arguments, task_index(0)), memory + buffer_place(0), warpgroup);
#pragma unroll 1
  for (int round = 0; task_index(round) < arguments.num_tasks; ++round) {
    const Task task(arguments, task_index(round));
    unsigned char* buffer = memory + buffer_place(round);
    consumer.is_last_task = task_index(round + 1) >= arguments.num_tasks;
    if (QUERY_BUFFERS == 1) begin_queries(arguments, task, buffer, warpgroup);
    end_queries(warpgroup);
    if (QUERY_BUFFERS == 2 && !consumer.is_last_task)
      begin_queries(arguments, Task(arguments, task_index(round + 1)), memory + buffer_place(round + 1), warpgroup);
    consumer.queries = barriers.shared + buffer_place(round);
    consumer.scale = arguments.scale * (scales_heads(KEY_FORMAT) ? arguments.key_scales[task.kv_head] : 1.0f);
    consumer.run(task, memory);
    consumer.put_out(arguments, task, buffer);
    if (QUERY_BUFFERS == 1) named_barrier_sync(1 + WARPGROUPS + warpgroup, 128);  // all results have been read
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
        mbarrier_init(barriers.full(side, stage), IS_WIDENED ? 4 : 1);
        mbarrier_init(barriers.empty(side, stage), WARPGROUPS * 4);
      }
    }
    for (int stage = 0; stage < STAGED; ++stage) mbarrier_init(barriers.staged(stage), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  grid_dependency_launch();
  grid_dependency_wait();
  if (threadIdx.x >= CONSUMERS) {
    warpgroup_give_registers<PRODUCER_REGISTERS>();
    const int warp = (threadIdx.x - CONSUMERS) / 32;
    if constexpr (IS_WIDENED) {
      widen_sides(arguments, barriers, memory);
    } else if (warp < 2) {
      fetch_side(arguments, warp ? &values : &keys, barriers, warp);
    }
  } else {
    warpgroup_take_registers<CONSUMER_REGISTERS>();
    consume(arguments, barriers, memory);
  }
}
