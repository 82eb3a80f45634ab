// Causal attention of several new tokens a sequence over the paged KV cache, on Hopper: products by wgmma.
//
// A block's tile has WARPGROUPS * 64 rows. As in attention_prefill.cu a row is one query head of one token, and the
// GROUP query heads of a KV head stand together. One warpgroup more brings keys and values, TILE tokens a stage: a warp
// for each side fetches a page's 16 tokens in one copy that swizzles them for wgmma, or, from an 8-bit cache, two warps
// widen to fp16 what was fetched as it lies. Tokens that no page holds come as zeros.
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
// WARPGROUPS, TILE, STAGES, STAGED (stages of codes of each side), and that of fused_elements.cuh.
#include "attention_prefill_fetch.cuh"
#include "attention_prefill_shape.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/barrier.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/exponential.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/wgmma_transposed.cuh"

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
    if (WARPGROUPS > 1) named_barrier_sync(1 + warpgroup, 256);
  }
  __device__ __forceinline__ void end_turn(bool is_last_tile) const {
    const bool is_last = is_last_task && is_last_tile && warpgroup == WARPGROUPS - 1;  // nobody's turn comes after it
    if (WARPGROUPS > 1 && !is_last) named_barrier_arrive(1 + (warpgroup + 1) % WARPGROUPS, 256);
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
  if (WARPGROUPS > 1 && warpgroup == WARPGROUPS - 1) named_barrier_arrive(1, 256);
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
        mbarrier_init(barriers.full(side, stage), IS_WIDENED ? 2 : 1);
        mbarrier_init(barriers.empty(side, stage), WARPGROUPS * 4);
      }
    }
    for (int stage = 0; stage < 2 * STAGED; ++stage) mbarrier_init(barriers.staged(0, stage), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  grid_dependency_launch();
  grid_dependency_wait();
  if (threadIdx.x >= CONSUMERS) {
    warpgroup_give_registers<PRODUCER_REGISTERS>();
    const int warp = (threadIdx.x - CONSUMERS) / 32;
    if constexpr (IS_WIDENED) {
      if (warp < 2) {
        widen_side<KEY_FORMAT>(arguments, barriers, memory, 0);
      } else {
        widen_side<VALUE_FORMAT>(arguments, barriers, memory, 1);
      }
    } else if (warp < 2) {
      fetch_side(arguments, warp ? &values : &keys, barriers, warp);
    }
  } else {
    warpgroup_take_registers<CONSUMER_REGISTERS>();
    consume(arguments, barriers, memory);
  }
}
