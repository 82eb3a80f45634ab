// Attention of one new token a sequence over the paged KV cache.
//
// A block has one sequence, one KV head and one split of the context. Its warps take tiles of 16 tokens in turn, and
// every tile serves all GROUP query heads of the KV head: scores [heads x tokens] = Q K^T and result^T [channels x
// heads] = V^T P^T are products of 16 x 8 x 16 matrices.
//
// The order of channels inside a product is free as long as both factors share it, and so is the order of the result's
// rows. So each lane copies 16 neighbouring bytes, what it needs itself, straight into its own shared memory, and reads
// the operands from there as they are: no transposition, no exchange between lanes, no barrier in the loop. The copies
// run STAGES - 1 tiles ahead. Value pairs of two tokens are made by byte permutations.
//
// Splits of a sequence are merged by the block that finishes last, in the order of the splits: the result does not
// depend on which one that is.
//
// Macros: HEAD_DIM, GROUP (query heads of a KV head, at most 16), NUM_KV_HEADS, BLOCK_SIZE (a multiple of 16),
// KEY_FORMAT, VALUE_FORMAT (attention_cache.cuh), WARPS, STAGES, TILES (tiles of 16 tokens a step), and that of
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
#ifndef STAGES
#define STAGES 3
#endif
#ifndef TILES
#define TILES 1
#endif

#define ALL_LANES 0xffffffffu

constexpr int THREADS = WARPS * 32;
constexpr int L2_LINE = 128;         // that a copy brings to L2: of 64 neighbouring bytes at a time 3 % slower
constexpr int TILE = 16;             // tokens
constexpr int STEP = TILES * TILE;   // tokens that a warp takes at a time
constexpr int HEAD_TILES = (GROUP + 7) / 8;
constexpr int HEADS = HEAD_TILES * 8;
constexpr int NUM_HEADS = GROUP * NUM_KV_HEADS;
#define LOWEST __int_as_float(0xff800000)  // minus infinity
static_assert(GROUP >= 1 && GROUP <= 16, "the query heads of a KV head are the rows of one tile");
static_assert(HEAD_DIM % 16 == 0, "channels come in products of 16");
static_assert(BLOCK_SIZE % TILE == 0, "a tile lies in one page");
static_assert(STAGES >= 2, "one stage is copied while another is read");

// Items in one copy of a lane: four lanes share a token's keys, eight a token's values.
constexpr int KEY_ITEMS = vector_width(HEAD_DIM / 4, 16 / item_bytes(KEY_FORMAT));
constexpr int VALUE_ITEMS = vector_width(HEAD_DIM / 8, 16 / item_bytes(VALUE_FORMAT));
constexpr int KEY_COPY = KEY_ITEMS * item_bytes(KEY_FORMAT);  // bytes
constexpr int VALUE_COPY = VALUE_ITEMS * item_bytes(VALUE_FORMAT);
static_assert(KEY_ITEMS >= 4 && VALUE_ITEMS >= 2 && VALUE_COPY >= 4, "head_dim is too odd for this format");
constexpr int KEY_CHUNKS = HEAD_DIM / (4 * KEY_ITEMS);
constexpr int VALUE_CHUNKS = HEAD_DIM / (8 * VALUE_ITEMS);
constexpr int KEY_STEPS = HEAD_DIM / 16;    // products along the channels
constexpr int VALUE_TILES = HEAD_DIM / 16;  // products that make the result's rows

// A lane's part of a stage: the copies of all lanes side by side, so that reads have no bank conflicts.
constexpr int KEY_TILE_BYTES = TILE * HEAD_DIM * item_bytes(KEY_FORMAT);
constexpr int VALUE_TILE_BYTES = TILE * HEAD_DIM * item_bytes(VALUE_FORMAT);
constexpr bool HAS_VECTOR_SCALES = scales_vectors(KEY_FORMAT) || scales_vectors(VALUE_FORMAT);
constexpr int SCALE_BYTES = HAS_VECTOR_SCALES ? 2 * TILE * 4 : 0;
constexpr int TILE_BYTES = KEY_TILE_BYTES + VALUE_TILE_BYTES + SCALE_BYTES;
constexpr int STAGE_BYTES = TILES * TILE_BYTES;

struct Arguments {
  const Element* queries;       // [sequences, NUM_HEADS, HEAD_DIM]
  const unsigned char* keys;    // [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
  const unsigned char* values;
  const float* key_scales;      // [NUM_KV_HEADS], or [num_blocks, NUM_KV_HEADS, BLOCK_SIZE]
  const float* value_scales;
  const int* block_tables;      // [sequences, table_stride]
  const int* context_lens;      // [sequences]; 0: padding, the result is zero
  Element* output;              // like queries
  float* partial_results;       // [sequences, NUM_KV_HEADS, splits, GROUP, HEAD_DIM]
  float* partial_sums;          // [sequences, NUM_KV_HEADS, splits, GROUP, 2]: maximum, sum
  int* counters;                // [sequences, NUM_KV_HEADS], zero before and after
  int table_stride;
  int sliding_window;           // 0: none
  int min_tokens;               // of a split
  float scale;                  // of the scores, times log2(e)
};

template <int BYTES>
__device__ __forceinline__ void read_words(const unsigned char* shared, unsigned (&words)[(BYTES + 3) / 4]) {
  const Vector<unsigned, BYTES / 4> vector = *reinterpret_cast<const Vector<unsigned, BYTES / 4>*>(shared);
#pragma unroll
  for (int i = 0; i < BYTES / 4; ++i) words[i] = vector.items[i];
}

// A warp's walk over its steps of the context, and the copies ahead of it.
struct Walk {
  const Arguments& arguments;
  unsigned char* stages;  // this warp's
  const int* table;
  int lane, kv_head, first_token, context_len, first_step, num_steps;
  int pages[TILES];  // of the step (lane) in the current run of 32 steps, held by each lane

  __device__ __forceinline__ int token_of(int step) const { return (first_step + step * WARPS) * STEP; }

  __device__ __forceinline__ void look_up(int step) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int token = token_of(step + lane) + tile * TILE;
      pages[tile] = step + lane < num_steps && token < context_len ? table[token / BLOCK_SIZE] : 0;
    }
  }

  // The position of a lane's copy inside a tile, in the order in which they are read.
  __device__ __forceinline__ unsigned char* key_copy(unsigned char* tile, int half, int chunk) const {
    return tile + ((half * KEY_CHUNKS + chunk) * 32 + lane) * KEY_COPY;
  }
  __device__ __forceinline__ unsigned char* value_copy(unsigned char* tile, int slot, int chunk) const {
    return tile + KEY_TILE_BYTES + ((slot * VALUE_CHUNKS + chunk) * 32 + lane) * VALUE_COPY;
  }
  __device__ __forceinline__ float* scale_copy(unsigned char* tile) const {
    return reinterpret_cast<float*>(tile + KEY_TILE_BYTES + VALUE_TILE_BYTES);
  }

  __device__ __forceinline__ void fetch(int step) {
    if (step < num_steps) {
      if (step % 32 == 0) look_up(step);
      unsigned char* stage = stages + (step % STAGES) * STAGE_BYTES;
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        fetch_tile(stage + tile * TILE_BYTES, token_of(step) + tile * TILE,
                   __shfl_sync(ALL_LANES, pages[tile], step % 32));
    }
    copy_async_commit();
  }

  __device__ __forceinline__ bool exists(int token) const { return token >= first_token && token < context_len; }

  __device__ __forceinline__ void fetch_tile(unsigned char* tile, int token, int page) {
    const int row = lane / 4, quarter = lane % 4;
    const long long vector =
        (static_cast<long long>(page) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int offset = half * 8 + row;
      const unsigned char* source = arguments.keys + ((vector + offset) * HEAD_DIM + quarter * KEY_ITEMS) *
                                                         item_bytes(KEY_FORMAT);
#pragma unroll
      for (int chunk = 0; chunk < KEY_CHUNKS; ++chunk)
        copy_async<KEY_COPY, L2_LINE>(key_copy(tile, half, chunk), source + chunk * 4 * KEY_COPY, exists(token + offset));
    }
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      const int offset = slot / 2 * 8 + quarter * 2 + slot % 2;
      const unsigned char* source = arguments.values + ((vector + offset) * HEAD_DIM + row * VALUE_ITEMS) *
                                                           item_bytes(VALUE_FORMAT);
#pragma unroll
      for (int chunk = 0; chunk < VALUE_CHUNKS; ++chunk)
        copy_async<VALUE_COPY, L2_LINE>(value_copy(tile, slot, chunk), source + chunk * 8 * VALUE_COPY,
                               exists(token + offset));
    }
    if (HAS_VECTOR_SCALES) {
      const int offset = lane % TILE;
      const bool is_value = lane >= TILE;
      const bool wanted = is_value ? scales_vectors(VALUE_FORMAT) : scales_vectors(KEY_FORMAT);
      const float* scales = is_value ? arguments.value_scales : arguments.key_scales;
      copy_async<4>(scale_copy(tile) + lane, scales + (wanted ? vector + offset : 0),
                    wanted && exists(token + offset));
    }
  }
};

// Queries as the left factor: rows are heads; the channels of a product are those that the lane's key copies have.
__device__ __forceinline__ void load_queries(const Element* queries, int lane, unsigned (&operands)[KEY_STEPS][4]) {
  constexpr bool IS_BF16 = multiplies_bf16(KEY_FORMAT);
#pragma unroll
  for (int step = 0; step < KEY_STEPS; ++step) {
    const int chunk = step / (KEY_ITEMS / 4), part = step % (KEY_ITEMS / 4);
    const int channel = chunk * 4 * KEY_ITEMS + (lane % 4) * KEY_ITEMS + part * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = lane / 4 + (i % 2) * 8;
      float pair[2] = {0.0f, 0.0f};
      if (head < GROUP) load(queries + head * HEAD_DIM + channel + (i / 2) * 2, pair);
      operands[step][i] = pack_pair<IS_BF16>(pair[0], pair[1]);
    }
  }
}

// scores[half] += Q K^T for the 8 tokens of each half of a tile.
__device__ __forceinline__ void score_tile(const Walk& walk, unsigned char* tile,
                                           const unsigned (&queries)[KEY_STEPS][4], float (&scores)[2][4]) {
  constexpr bool IS_BF16 = multiplies_bf16(KEY_FORMAT);
#pragma unroll
  for (int chunk = 0; chunk < KEY_CHUNKS; ++chunk) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned words[(KEY_COPY + 3) / 4];
      read_words<KEY_COPY>(walk.key_copy(tile, half, chunk), words);
#pragma unroll
      for (int part = 0; part < KEY_ITEMS / 4; ++part) {
        const unsigned(&operands)[4] = queries[chunk * (KEY_ITEMS / 4) + part];
#if KEY_FORMAT < 2
        multiply_add<IS_BF16>(scores[half], operands, words[2 * part], words[2 * part + 1]);
#else
        multiply_add<IS_BF16>(scores[half], operands, decode_pair<KEY_FORMAT>(words[part]),
                              decode_pair<KEY_FORMAT>(words[part] >> 16));
#endif
      }
    }
  }
}

// results += V^T P^T for the 16 tokens of a tile.
__device__ __forceinline__ void mix_tile(const Walk& walk, unsigned char* tile,
                                         const unsigned (&weights)[HEAD_TILES][2],
                                         float (&results)[VALUE_TILES][HEAD_TILES][4]) {
  constexpr bool IS_BF16 = multiplies_bf16(VALUE_FORMAT);
#pragma unroll
  for (int chunk = 0; chunk < VALUE_CHUNKS; ++chunk) {
    unsigned words[4][(VALUE_COPY + 3) / 4];
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) read_words<VALUE_COPY>(walk.value_copy(tile, slot, chunk), words[slot]);
#pragma unroll
    for (int pair = 0; pair < VALUE_ITEMS / 2; ++pair) {
      unsigned operands[4];
#if VALUE_FORMAT < 2
      operands[0] = __byte_perm(words[0][pair], words[1][pair], 0x5410);
      operands[1] = __byte_perm(words[0][pair], words[1][pair], 0x7632);
      operands[2] = __byte_perm(words[2][pair], words[3][pair], 0x5410);
      operands[3] = __byte_perm(words[2][pair], words[3][pair], 0x7632);
#else
      const unsigned order = pair % 2 ? 0x7362 : 0x5140;
      const unsigned low = __byte_perm(words[0][pair / 2], words[1][pair / 2], order);
      const unsigned high = __byte_perm(words[2][pair / 2], words[3][pair / 2], order);
      operands[0] = decode_pair<VALUE_FORMAT>(low);
      operands[1] = decode_pair<VALUE_FORMAT>(low >> 16);
      operands[2] = decode_pair<VALUE_FORMAT>(high);
      operands[3] = decode_pair<VALUE_FORMAT>(high >> 16);
#endif
#pragma unroll
      for (int heads = 0; heads < HEAD_TILES; ++heads)
        multiply_add<IS_BF16>(results[chunk * (VALUE_ITEMS / 2) + pair][heads], operands, weights[heads][0],
                              weights[heads][1]);
    }
  }
}

// Running maxima and sums of a warp: entry 0 is head lane / 4, entry 1 that plus 8. Sums are of the lane's own tokens.
struct Softmax {
  float maxima[2], sums[2];

  // Turns scores into weights exp2(score - maximum), and rescales what was gathered under a smaller maximum.
  __device__ __forceinline__ void update(float (&scores)[2 * TILES][4], int lane,
                                         float (&results)[VALUE_TILES][HEAD_TILES][4]) {
    float corrections[2] = {1.0f, 1.0f};
    bool changed = false;
#pragma unroll
    for (int half = 0; half < HEAD_TILES; ++half) {
      float maximum = maxima[half];
#pragma unroll
      for (int n = 0; n < 2 * TILES; ++n)
        maximum = fmaxf(maximum, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 2));
      changed |= maximum != maxima[half];
      corrections[half] = power_of_two(maxima[half] - maximum);
      maxima[half] = maximum;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 2 * TILES; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = power_of_two(scores[n][i] - maximum);
          sum += scores[n][i];
        }
      }
      sums[half] = sums[half] * corrections[half] + sum;
    }
    if (!__any_sync(ALL_LANES, changed)) return;
#pragma unroll
    for (int heads = 0; heads < HEAD_TILES; ++heads) {
      // The result's columns 2t and 2t + 1 are heads whose maxima other lanes hold.
      const float even = __shfl_sync(ALL_LANES, corrections[heads], lane % 4 * 8);
      const float odd = __shfl_sync(ALL_LANES, corrections[heads], lane % 4 * 8 + 4);
#pragma unroll
      for (int tile = 0; tile < VALUE_TILES; ++tile) {
        results[tile][heads][0] *= even;
        results[tile][heads][1] *= odd;
        results[tile][heads][2] *= even;
        results[tile][heads][3] *= odd;
      }
    }
  }
};

// The channel of the result in row `row` (0 or 1: lane / 4, and that plus 8) of a lane's product `tile`.
__device__ __forceinline__ int result_channel(int tile, int row, int lane) {
  const int chunk = tile / (VALUE_ITEMS / 2), pair = tile % (VALUE_ITEMS / 2);
  return chunk * 8 * VALUE_ITEMS + (lane / 4) * VALUE_ITEMS + pair * 2 + row;
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_decode(const __grid_constant__ Arguments arguments) {
  unsigned char* shared = dynamic_shared();
  __shared__ float warp_maxima[WARPS][HEADS], warp_sums[WARPS][HEADS];
  __shared__ int is_last;
  grid_dependency_launch();  // context lengths and block tables were there before the kernel in front began

  const int split = blockIdx.x, num_splits = gridDim.x, kv_head = blockIdx.y, sequence = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int context_len = arguments.context_lens[sequence];
  const int window = arguments.sliding_window;
  const int first_token = window > 0 && context_len > window ? context_len - window : 0;
  const int begin = first_token / STEP, end = (context_len + STEP - 1) / STEP;  // steps that hold a visible token
  const int least = (arguments.min_tokens + STEP - 1) / STEP;
  const int steps_per_split = max(max((end - begin + num_splits - 1) / num_splits, least), 1);
  const int used_splits = max((end - begin + steps_per_split - 1) / steps_per_split, 1);
  if (split >= used_splits) return;

  const int split_begin = begin + split * steps_per_split, split_end = min(split_begin + steps_per_split, end);
  const int own_begin = split_begin + warp;
  const int num_steps = own_begin < split_end ? (split_end - own_begin + WARPS - 1) / WARPS : 0;
  Walk walk = {arguments,
               shared + warp * STAGES * STAGE_BYTES,
               arguments.block_tables + static_cast<long long>(sequence) * arguments.table_stride,
               lane, kv_head, first_token, context_len, own_begin, num_steps};
  // The kernel in front writes the newest token alone: all tiles before its own can be on their way already.
  int stage = 0;
#pragma unroll 1
  for (; stage < STAGES - 1 && stage < num_steps && walk.token_of(stage) + STEP < context_len; ++stage)
    walk.fetch(stage);
  grid_dependency_wait();
#pragma unroll 1
  for (; stage < STAGES - 1; ++stage) walk.fetch(stage);

  unsigned queries[KEY_STEPS][4];
  const long long first_head = static_cast<long long>(sequence) * NUM_HEADS + kv_head * GROUP;
  load_queries(arguments.queries + first_head * HEAD_DIM, lane, queries);
  const float scale = arguments.scale * (scales_heads(KEY_FORMAT) ? arguments.key_scales[kv_head] : 1.0f);

  Softmax softmax = {{LOWEST, LOWEST}, {0.0f, 0.0f}};
  float results[VALUE_TILES][HEAD_TILES][4] = {};
  for (int step = 0; step < num_steps; ++step) {
    copy_async_wait<STAGES - 2>();
    if (HAS_VECTOR_SCALES) __syncwarp();  // scales are read by other lanes than copied them
    walk.fetch(step + STAGES - 1);
    unsigned char* stage = walk.stages + (step % STAGES) * STAGE_BYTES;
    float scores[2 * TILES][4] = {};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      float(&own)[2][4] = *reinterpret_cast<float(*)[2][4]>(&scores[2 * tile]);
      score_tile(walk, stage + tile * TILE_BYTES, queries, own);
    }
    const int token = walk.token_of(step);
    const bool whole = token >= first_token && token + STEP <= context_len;
#pragma unroll
    for (int n = 0; n < 2 * TILES; ++n) {
      const float* key_scales = walk.scale_copy(stage + n / 2 * TILE_BYTES) + n % 2 * 8 + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] *= scales_vectors(KEY_FORMAT) ? scale * key_scales[i % 2] : scale;
        if (!whole && !walk.exists(token + n * 8 + lane % 4 * 2 + i % 2)) scores[n][i] = LOWEST;
      }
    }
    softmax.update(scores, lane, results);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      unsigned weights[HEAD_TILES][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float factors[2] = {1.0f, 1.0f};
        if (scales_vectors(VALUE_FORMAT))
          load(walk.scale_copy(stage + tile * TILE_BYTES) + TILE + half * 8 + lane % 4 * 2, factors);
#pragma unroll
        for (int heads = 0; heads < HEAD_TILES; ++heads)
          weights[heads][half] = pack_pair<multiplies_bf16(VALUE_FORMAT)>(
              scores[2 * tile + half][2 * heads] * factors[0], scores[2 * tile + half][2 * heads + 1] * factors[1]);
      }
      mix_tile(walk, stage + tile * TILE_BYTES, weights, results);
    }
    if (HAS_VECTOR_SCALES) __syncwarp();
  }
  copy_async_wait<0>();

  // The warps' results meet in shared memory: [WARPS][GROUP][HEAD_DIM].
#pragma unroll
  for (int half = 0; half < HEAD_TILES; ++half) {
    float sum = softmax.sums[half];
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    if (lane % 4 == 0) {
      warp_maxima[warp][half * 8 + lane / 4] = softmax.maxima[half];
      warp_sums[warp][half * 8 + lane / 4] = sum;
    }
  }
  __syncthreads();
  float* warp_results = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int tile = 0; tile < VALUE_TILES; ++tile) {
#pragma unroll
    for (int heads = 0; heads < HEAD_TILES; ++heads) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = heads * 8 + lane % 4 * 2 + i % 2;
        if (head < GROUP)
          warp_results[(warp * GROUP + head) * HEAD_DIM + result_channel(tile, i / 2, lane)] = results[tile][heads][i];
      }
    }
  }
  __syncthreads();

  const float value_scale = scales_heads(VALUE_FORMAT) ? arguments.value_scales[kv_head] : 1.0f;
  const long long place = static_cast<long long>(sequence) * NUM_KV_HEADS + kv_head;
  Element* output = arguments.output + first_head * HEAD_DIM;
  for (int index = threadIdx.x; index < GROUP * HEAD_DIM; index += THREADS) {
    const int head = index / HEAD_DIM;
    float maximum = LOWEST;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) maximum = fmaxf(maximum, warp_maxima[other][head]);
    float sum = 0.0f, result = 0.0f;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) {
      if (warp_sums[other][head] == 0.0f) continue;  // a warp without tokens
      const float weight = power_of_two(warp_maxima[other][head] - maximum);
      sum += weight * warp_sums[other][head];
      result += weight * warp_results[other * GROUP * HEAD_DIM + index];
    }
    if (used_splits == 1) {
      output[index] = to_element(context_len > 0 ? result / sum * value_scale : 0.0f);
    } else {
      const long long part = place * num_splits + split;
      __stcg(arguments.partial_results + part * GROUP * HEAD_DIM + index, result);
      if (index % HEAD_DIM == 0) {
        __stcg(arguments.partial_sums + (part * GROUP + head) * 2, maximum);
        __stcg(arguments.partial_sums + (part * GROUP + head) * 2 + 1, sum);
      }
    }
  }
  if (used_splits == 1) return;

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(arguments.counters + place, 1) == used_splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int index = threadIdx.x; index < GROUP * HEAD_DIM; index += THREADS) {
    const float* sums = arguments.partial_sums + (place * num_splits * GROUP + index / HEAD_DIM) * 2;
    const float* parts = arguments.partial_results + place * num_splits * GROUP * HEAD_DIM + index;
    float maximum = LOWEST;
    for (int other = 0; other < used_splits; ++other) maximum = fmaxf(maximum, __ldcg(sums + other * GROUP * 2));
    float sum = 0.0f, result = 0.0f;
#pragma unroll 4
    for (int other = 0; other < used_splits; ++other) {
      const float weight = power_of_two(__ldcg(sums + other * GROUP * 2) - maximum);
      sum += weight * __ldcg(sums + other * GROUP * 2 + 1);
      result += weight * __ldcg(parts + static_cast<long long>(other) * GROUP * HEAD_DIM);
    }
    output[index] = to_element(result / sum * value_scale);
  }
  if (threadIdx.x == 0) arguments.counters[place] = 0;
}
