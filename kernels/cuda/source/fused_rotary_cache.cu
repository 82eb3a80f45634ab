// Rotary positions, the norms of queries and keys, and the write into the paged KV cache, from the joint projection.
//
// A row of `qkv` holds NUM_HEADS queries, NUM_KV_HEADS keys and as many values of HEAD_DIM elements. Queries are
// (normed and) rotated into `queries`; keys likewise into the cache, values as they are. Channel j pairs with channel
// j + ROTARY_DIM / 2; channels from ROTARY_DIM on are left alone. A head vector belongs to a group of LANES neighbouring
// lanes, each with vectors of WIDTH pairs. A negative slot (padding) writes nothing.
// Macros: HEAD_DIM, ROTARY_DIM, NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, HAS_NORM, KEY_FORMAT, VALUE_FORMAT (0: bf16,
// 1: fp16, 2: FP8 e4m3 with a scale a head, 3: int8 with a scale a head vector), and that of fused_elements.cuh.
#include "fused_elements.cuh"
#include "fused_reduction.cuh"
#include "ptx/grid_dependency.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef ROTARY_DIM
#define ROTARY_DIM HEAD_DIM
#endif
#ifndef NUM_HEADS
#define NUM_HEADS 32
#endif
#ifndef NUM_KV_HEADS
#define NUM_KV_HEADS 8
#endif
#ifndef BLOCK_SIZE
#define BLOCK_SIZE 16
#endif
#ifndef HAS_NORM
#define HAS_NORM 0
#endif
#ifndef KEY_FORMAT
#define KEY_FORMAT 0
#endif
#ifndef VALUE_FORMAT
#define VALUE_FORMAT 0
#endif
#ifndef THREADS
#define THREADS 128
#endif

constexpr int HALF = ROTARY_DIM / 2;
constexpr int REST = HEAD_DIM - ROTARY_DIM;
static_assert(ROTARY_DIM % 2 == 0 && ROTARY_DIM <= HEAD_DIM, "rotary positions pair channels");
constexpr int WIDTH = vector_width(HALF | HEAD_DIM, 8);  // divides both
__host__ __device__ constexpr int lanes_for(int vectors) { return vectors <= 1 ? 1 : vectors > 16 ? 32 : 2 * lanes_for((vectors + 1) / 2); }
constexpr int LANES = lanes_for(HALF / WIDTH);
constexpr int ITEMS = (HALF / WIDTH + LANES - 1) / LANES;
constexpr int REST_ITEMS = (REST / WIDTH + LANES - 1) / LANES;
constexpr int HEADS = NUM_HEADS + 2 * NUM_KV_HEADS;

// One head vector in the registers of its lanes: both halves of the pairs, then the channels that do not rotate.
struct Head {
  float first[ITEMS][WIDTH], second[ITEMS][WIDTH], rest[REST_ITEMS + 1][WIDTH];
};

template <typename Visit>
__device__ __forceinline__ void each_vector(Head& head, int lane, Visit visit) {
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    const int column = (item * LANES + lane) * WIDTH;
    if (column >= HALF) break;
    visit(head.first[item], column);
    visit(head.second[item], column + HALF);
  }
#pragma unroll
  for (int item = 0; item < REST_ITEMS; ++item) {
    const int column = (item * LANES + lane) * WIDTH;
    if (column >= REST) break;
    visit(head.rest[item], column + ROTARY_DIM);
  }
}

// The cosines and sines of one position for a lane's pairs.
struct Rotation {
  float cos[ITEMS][WIDTH], sin[ITEMS][WIDTH];

  __device__ __forceinline__ void fetch(const float* all_cos, const float* all_sin, int lane) {
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
      const int column = (item * LANES + lane) * WIDTH;
      if (column >= HALF) break;
      load(all_cos + column, cos[item]);
      load(all_sin + column, sin[item]);
    }
  }

  __device__ __forceinline__ void apply(Head& head) const {
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const float first = head.first[item][i], second = head.second[item][i];
        head.first[item][i] = first * cos[item][i] - second * sin[item][i];
        head.second[item][i] = second * cos[item][i] + first * sin[item][i];
      }
    }
  }
};

__device__ __forceinline__ void norm(Head& head, int lane, const float* gain, float eps) {
  float sum = 0.0f;
  each_vector(head, lane, [&](float(&values)[WIDTH], int) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum += values[i] * values[i];
  });
  const float inverse = rsqrtf(lane_sum<LANES>(sum) / HEAD_DIM + eps);
  each_vector(head, lane, [&](float(&values)[WIDTH], int column) {
    float factors[WIDTH];
    load(gain + column, factors);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) values[i] *= inverse * factors[i];
  });
}

// All lanes of a warp call this, whether their group has something to write or not.
template <int FORMAT>
__device__ __forceinline__ void write_cache(Head& head, int lane, bool writes, long long vector, int kv_head,
                                            void* cache, float* scales) {
  float scale = FORMAT == 2 ? scales[kv_head] : 1.0f;
  if (FORMAT == 3) {
    unsigned absmax = 0;
    each_vector(head, lane, [&](float(&values)[WIDTH], int) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) absmax = max(absmax, magnitude_bits(values[i]));
    });
    scale = dynamic_scale(lane_max<LANES>(absmax), 127.0f);
    if (writes && lane == 0) scales[vector] = scale;
  }
  if (!writes) return;
  each_vector(head, lane, [&](float(&values)[WIDTH], int column) {
    const long long target = vector * HEAD_DIM + column;
    if (FORMAT == 0) {
      Vector<__nv_bfloat16, WIDTH> items;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) items.items[i] = __float2bfloat16_rn(values[i]);
      *reinterpret_cast<Vector<__nv_bfloat16, WIDTH>*>(static_cast<__nv_bfloat16*>(cache) + target) = items;
    } else if (FORMAT == 1) {
      Vector<__half, WIDTH> items;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) items.items[i] = __float2half_rn(values[i]);
      *reinterpret_cast<Vector<__half, WIDTH>*>(static_cast<__half*>(cache) + target) = items;
    } else {
      Vector<unsigned char, WIDTH> items;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        items.items[i] = FORMAT == 2 ? float8_code(values[i], scale)
                                     : static_cast<unsigned char>(int8_code(values[i], scale));
      *reinterpret_cast<Vector<unsigned char, WIDTH>*>(static_cast<unsigned char*>(cache) + target) = items;
    }
  });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fused_rotary_cache(const Element* __restrict__ qkv, const int* __restrict__ positions,
                       const long long* __restrict__ slots, const float* __restrict__ cos,
                       const float* __restrict__ sin, const float* __restrict__ query_gain,
                       const float* __restrict__ key_gain, Element* __restrict__ queries, void* __restrict__ keys,
                       void* __restrict__ values, float* __restrict__ key_scales, float* __restrict__ value_scales,
                       float eps, int num_tokens) {
  grid_dependency_launch();  // positions and slots were there before the kernel in front began
  const int lane = threadIdx.x % LANES;
  const long long index = static_cast<long long>(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  const bool exists = index < static_cast<long long>(num_tokens) * HEADS;
  const int token = exists ? static_cast<int>(index / HEADS) : 0;
  const int head_index = exists ? static_cast<int>(index % HEADS) : 0;
  const bool is_query = head_index < NUM_HEADS, is_value = head_index >= NUM_HEADS + NUM_KV_HEADS;
  Rotation rotation;
  const long long row = static_cast<long long>(positions[token]) * HALF;
  if (!is_value) rotation.fetch(cos + row, sin + row, lane);
  const long long slot = slots[token];
  grid_dependency_wait();

  Head head;
  const Element* source = qkv + (static_cast<long long>(token) * HEADS + head_index) * HEAD_DIM;
  each_vector(head, lane, [&](float(&items)[WIDTH], int column) { load(source + column, items); });
  if (HAS_NORM) {
    Head normed = head;
    norm(normed, lane, is_query ? query_gain : key_gain, eps);  // shuffles: every lane takes part
    if (!is_value) head = normed;
  }
  if (!is_value) rotation.apply(head);
  if (is_query && exists) {
    Element* target = queries + (static_cast<long long>(token) * NUM_HEADS + head_index) * HEAD_DIM;
    each_vector(head, lane, [&](float(&items)[WIDTH], int column) { store(target + column, items); });
  }
  const bool writes = exists && !is_query && slot >= 0;
  const int kv_head = is_query ? 0 : (head_index - NUM_HEADS) % NUM_KV_HEADS;
  const long long vector = (slot / BLOCK_SIZE * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE;
  // A warp may hold keys and values: both branches are taken by all of its lanes.
  write_cache<KEY_FORMAT>(head, lane, writes && !is_value, vector, kv_head, keys, key_scales);
  write_cache<VALUE_FORMAT>(head, lane, writes && is_value, vector, kv_head, values, value_scales);
}
