// Causal attention of several new tokens a sequence over the paged KV cache: prompts, their chunks, and mixed batches.
//
// A row of a block's tile is one query head of one token; the GROUP query heads of a KV head stand together, so that
// they share its keys and values even where a sequence has only a few new tokens. Each warp has 16 rows and keeps
// their queries, running softmax and result in registers; the block walks over the context 64 tokens at a time, with
// the next ones on their way to shared memory. Rows of shared memory are padded by 16 bytes: ldmatrix then meets no
// bank conflict. 8-bit caches are widened to fp16 there.
//
// Macros: HEAD_DIM, GROUP, NUM_KV_HEADS, BLOCK_SIZE, KEY_FORMAT, VALUE_FORMAT (attention_cache.cuh), WARPS, and that of
// fused_elements.cuh.
#include "attention_cache.cuh"
#include "fused_elements.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/exponential.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/warp_matrix.cuh"

#ifndef WARPS
#define WARPS 4
#endif

#define ALL_LANES 0xffffffffu

constexpr int THREADS = WARPS * 32;
constexpr int ROWS = WARPS * 16;
constexpr int TILE = 64;  // tokens
constexpr int NUM_HEADS = GROUP * NUM_KV_HEADS;
constexpr int CHANNEL_STEPS = HEAD_DIM / 16;
constexpr int ROW_BYTES = HEAD_DIM * 2 + 16;
constexpr int TILE_BYTES = TILE * ROW_BYTES;
// A stage holds a tile of keys and one of values, as operands or as 8-bit codes, and the scales of their vectors. Codes
// are widened into a tile of operands behind the stages when their turn comes.
constexpr bool IS_WIDENED = item_bytes(KEY_FORMAT) == 1 || item_bytes(VALUE_FORMAT) == 1;
constexpr int WIDEST_ITEM =
    item_bytes(KEY_FORMAT) > item_bytes(VALUE_FORMAT) ? item_bytes(KEY_FORMAT) : item_bytes(VALUE_FORMAT);
constexpr int SIDE_BYTES = IS_WIDENED ? TILE * HEAD_DIM * WIDEST_ITEM : TILE_BYTES;
constexpr int SCALES_PLACE = 2 * SIDE_BYTES;
constexpr int STAGE_BYTES = SCALES_PLACE + 2 * TILE * 4;
#define LOWEST __int_as_float(0xff800000)  // minus infinity
static_assert(HEAD_DIM % 16 == 0, "channels come in products of 16");

struct Arguments {
  const Element* queries;      // [tokens, NUM_HEADS, HEAD_DIM]
  const unsigned char* keys;   // [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
  const unsigned char* values;
  const float* key_scales;     // [NUM_KV_HEADS], or [num_blocks, NUM_KV_HEADS, BLOCK_SIZE]
  const float* value_scales;
  const int* block_tables;     // [sequences, table_stride]
  const int* context_lens;     // [sequences]
  const int* query_start;      // [sequences + 1]
  const int* tiles;            // [tiles, 2]: sequence, first row
  Element* output;             // like queries
  int table_stride;
  int sliding_window;          // 0: none
  float scale;                 // of the scores, times log2(e)
};

// Brings 64 tokens of one side of the cache to shared memory; zeros where there is no token to see. Operands get rows of
// ROW_BYTES, what is widened later lies dense.
template <int FORMAT>
__device__ __forceinline__ void fetch_side(unsigned char* target, const unsigned char* cache, const int* table,
                                           int kv_head, int first, int first_token, int end_token) {
  constexpr int COPY = vector_width(HEAD_DIM * item_bytes(FORMAT), 16);  // bytes
  constexpr int UNITS = HEAD_DIM * item_bytes(FORMAT) / COPY;
  constexpr int STRIDE = IS_WIDENED ? HEAD_DIM * item_bytes(FORMAT) : ROW_BYTES;
  constexpr int UNROLLED = IS_WIDENED ? 2 : 4;  // more of the former spills registers
#pragma unroll UNROLLED
  for (int index = threadIdx.x; index < TILE * UNITS; index += THREADS) {
    const int row = index / UNITS, unit = index % UNITS, token = first + row;
    const bool exists = token >= first_token && token < end_token;
    const int page = exists ? table[token / BLOCK_SIZE] : 0;
    const long long vector =
        (static_cast<long long>(page) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE;
    copy_async<COPY>(target + row * STRIDE + unit * COPY, cache + vector * HEAD_DIM * item_bytes(FORMAT) + unit * COPY,
                     exists);
  }
}

// Makes rows of operands of what fetch_side has brought.
template <int FORMAT>
__device__ __forceinline__ void widen_side(unsigned char* target, const unsigned char* source) {
  constexpr int UNITS = HEAD_DIM / 8;  // of 8 items
  for (int index = threadIdx.x; index < TILE * UNITS; index += THREADS) {
    const int row = index / UNITS, unit = index % UNITS;
    Vector<unsigned, 4> wide;
    if constexpr (item_bytes(FORMAT) == 2) {
      wide = *reinterpret_cast<const Vector<unsigned, 4>*>(source + index * 16);
    } else {
      const Vector<unsigned, 2> codes = *reinterpret_cast<const Vector<unsigned, 2>*>(source + index * 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        wide.items[2 * i] = decode_pair<FORMAT>(codes.items[i]);
        wide.items[2 * i + 1] = decode_pair<FORMAT>(codes.items[i] >> 16);
      }
    }
    *reinterpret_cast<Vector<unsigned, 4>*>(target + row * ROW_BYTES + unit * 16) = wide;
  }
}

template <int FORMAT>
__device__ __forceinline__ void fetch_scales(float* target, const float* scales, const int* table, int kv_head,
                                             int first, int first_token, int end_token) {
  if constexpr (scales_vectors(FORMAT)) {
    for (int row = threadIdx.x; row < TILE; row += THREADS) {
      const int token = first + row;
      const bool exists = token >= first_token && token < end_token;
      const int page = exists ? table[token / BLOCK_SIZE] : 0;
      const long long vector =
          (static_cast<long long>(page) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE;
      target[row] = exists ? scales[vector] : 0.0f;
    }
  }
}

__device__ __forceinline__ void fetch_tile(const Arguments& arguments, unsigned char* stage, const int* table,
                                           int kv_head, int first, int first_token, int end_token) {
  float* scales = reinterpret_cast<float*>(stage + SCALES_PLACE);
  fetch_side<KEY_FORMAT>(stage, arguments.keys, table, kv_head, first, first_token, end_token);
  fetch_side<VALUE_FORMAT>(stage + SIDE_BYTES, arguments.values, table, kv_head, first, first_token, end_token);
  fetch_scales<KEY_FORMAT>(scales, arguments.key_scales, table, kv_head, first, first_token, end_token);
  fetch_scales<VALUE_FORMAT>(scales + TILE, arguments.value_scales, table, kv_head, first, first_token, end_token);
  copy_async_commit();
}

// scores = Q K^T for a warp's 16 rows and the tile's 64 tokens, 8 tokens an entry.
__device__ __forceinline__ void score_tile(const unsigned (&queries)[CHANNEL_STEPS][4], const unsigned char* keys,
                                           int lane, float (&scores)[TILE / 8][4]) {
  const unsigned char* row = keys + (lane % 8 + lane / 16 * 8) * ROW_BYTES + lane / 8 % 2 * 16;
#pragma unroll
  for (int step = 0; step < CHANNEL_STEPS; ++step) {  // outside: products that follow each other are independent
#pragma unroll
    for (int pair = 0; pair < TILE / 16; ++pair) {
      unsigned operands[4];
      load_matrices<false>(operands, row + pair * 16 * ROW_BYTES + step * 32);
      multiply_add<multiplies_bf16(KEY_FORMAT)>(scores[2 * pair], queries[step], operands[0], operands[1]);
      multiply_add<multiplies_bf16(KEY_FORMAT)>(scores[2 * pair + 1], queries[step], operands[2], operands[3]);
    }
  }
}

// result += P V, with the weights in the registers where the scores were.
__device__ __forceinline__ void mix_tile(const float (&weights)[TILE / 8][4], const unsigned char* values, int lane,
                                         float (&result)[HEAD_DIM / 8][4]) {
  constexpr bool IS_BF16 = multiplies_bf16(VALUE_FORMAT);
#pragma unroll
  for (int step = 0; step < TILE / 16; ++step) {
    const unsigned left[4] = {pack_pair<IS_BF16>(weights[2 * step][0], weights[2 * step][1]),
                              pack_pair<IS_BF16>(weights[2 * step][2], weights[2 * step][3]),
                              pack_pair<IS_BF16>(weights[2 * step + 1][0], weights[2 * step + 1][1]),
                              pack_pair<IS_BF16>(weights[2 * step + 1][2], weights[2 * step + 1][3])};
    const unsigned char* row = values + (step * 16 + lane % 16) * ROW_BYTES + lane / 16 * 16;
#pragma unroll
    for (int pair = 0; pair < HEAD_DIM / 16; ++pair) {
      unsigned operands[4];
      load_matrices<true>(operands, row + pair * 32);
      multiply_add<IS_BF16>(result[2 * pair], left, operands[0], operands[1]);
      multiply_add<IS_BF16>(result[2 * pair + 1], left, operands[2], operands[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_prefill(const __grid_constant__ Arguments arguments) {
  unsigned char* shared = dynamic_shared();
  grid_dependency_launch();
  grid_dependency_wait();
  const int sequence = arguments.tiles[2 * blockIdx.x], first_row = arguments.tiles[2 * blockIdx.x + 1];
  const int kv_head = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int query_begin = arguments.query_start[sequence];
  const int query_len = arguments.query_start[sequence + 1] - query_begin;
  const int context_len = arguments.context_lens[sequence];
  const int window = arguments.sliding_window > 0 ? arguments.sliding_window : 0x40000000;
  const int first_position = context_len - query_len;
  const int* table = arguments.block_tables + static_cast<long long>(sequence) * arguments.table_stride;

  // This lane's two rows, in every product: lane / 4 of the warp's 16, and that plus 8.
  const int num_rows = query_len * GROUP;
  int positions[2];
  long long heads[2];  // of the queries and the output, in vectors
  bool exists[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + warp * 16 + lane / 4 + i * 8;
    exists[i] = row < num_rows;
    const int query = min(row, num_rows - 1) / GROUP;
    positions[i] = first_position + query;
    heads[i] = static_cast<long long>(query_begin + query) * NUM_HEADS + kv_head * GROUP + min(row, num_rows - 1) % GROUP;
  }
  unsigned queries[CHANNEL_STEPS][4];
#pragma unroll
  for (int step = 0; step < CHANNEL_STEPS; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float pair[2] = {0.0f, 0.0f};
      if (exists[i % 2])
        load(arguments.queries + heads[i % 2] * HEAD_DIM + step * 16 + i / 2 * 8 + lane % 4 * 2, pair);
      queries[step][i] = pack_pair<multiplies_bf16(KEY_FORMAT)>(pair[0], pair[1]);
    }
  }

  // What the block's first and last rows see bounds the walk.
  const int lowest = first_position + first_row / GROUP;
  const int highest = first_position + (min(first_row + ROWS, num_rows) - 1) / GROUP;
  const int first_token = max(0, lowest - window + 1), end_token = highest + 1;
  const int begin = first_token / TILE, end = (end_token + TILE - 1) / TILE;
  const float scale = arguments.scale * (scales_heads(KEY_FORMAT) ? arguments.key_scales[kv_head] : 1.0f);

  float maxima[2] = {LOWEST, LOWEST}, sums[2] = {0.0f, 0.0f};
  float result[HEAD_DIM / 8][4] = {};
  fetch_tile(arguments, shared + begin % 2 * STAGE_BYTES, table, kv_head, begin * TILE, first_token, end_token);
  for (int tile = begin; tile < end; ++tile) {
    copy_async_wait<0>();
    __syncthreads();  // the tile is there for all, and the one before is no longer read
    if (tile + 1 < end)
      fetch_tile(arguments, shared + (tile + 1) % 2 * STAGE_BYTES, table, kv_head, (tile + 1) * TILE, first_token,
                 end_token);
    const unsigned char* stage = shared + tile % 2 * STAGE_BYTES;
    const float* scales = reinterpret_cast<const float*>(stage + SCALES_PLACE);
    const unsigned char *keys = stage, *values = stage + SIDE_BYTES;
    if constexpr (IS_WIDENED) {
      unsigned char* wide = shared + 2 * STAGE_BYTES;
      widen_side<KEY_FORMAT>(wide, stage);
      widen_side<VALUE_FORMAT>(wide + TILE_BYTES, stage + SIDE_BYTES);
      __syncthreads();
      keys = wide;
      values = wide + TILE_BYTES;
    }
    float scores[TILE / 8][4] = {};
    score_tile(queries, keys, lane, scores);

    const bool whole = (tile + 1) * TILE <= lowest + 1 && tile * TILE > highest - window;  // every row sees all of it
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i % 2;
        if (scales_vectors(KEY_FORMAT)) scores[n][i] *= scales[column];
        const int distance = positions[i / 2] - (tile * TILE + column);
        if (!whole && (distance < 0 || distance >= window)) scores[n][i] = LOWEST;
      }
    }
    float corrections[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float maximum = maxima[i];
#pragma unroll
      for (int n = 0; n < TILE / 8; ++n) maximum = fmaxf(maximum, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
      maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 2));
      const float base = maximum == LOWEST ? 0.0f : maximum * scale;  // a row may see nothing of the walk so far
      corrections[i] = power_of_two(maxima[i] * scale - base);
      maxima[i] = maximum;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) {
          scores[n][j] = power_of_two(scores[n][j] * scale - base);
          sum += scores[n][j];
          if (scales_vectors(VALUE_FORMAT)) scores[n][j] *= scales[TILE + n * 8 + lane % 4 * 2 + j % 2];
        }
      }
      sums[i] = sums[i] * corrections[i] + sum;
    }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) result[n][i] *= corrections[i / 2];
    }
    mix_tile(scores, values, lane, result);
  }

  const float value_scale = scales_heads(VALUE_FORMAT) ? arguments.value_scales[kv_head] : 1.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = sums[i];
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    if (!exists[i]) continue;
    const float factor = value_scale / sum;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
      const float pair[2] = {result[n][2 * i] * factor, result[n][2 * i + 1] * factor};
      store(arguments.output + heads[i] * HEAD_DIM + n * 8 + lane % 4 * 2, pair);
    }
  }
}
