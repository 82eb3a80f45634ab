// The warps of attention_prefill_wgmma.cu that bring keys and values: from a 16-bit cache as they are, from an 8-bit one
// widened to fp16.
#pragma once

#include "attention_prefill_shape.cuh"
#include "ptx/bulk_copy.cuh"

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

// A walk over the tiles of all tasks of this block.
struct Walk {
  const Arguments& arguments;
  int round;
  Task task;
  int tile;

  __device__ __forceinline__ explicit Walk(const Arguments& own)
      : arguments(own), round(0), task(own, task_index(0)), tile(task.end - 1) {}
  __device__ __forceinline__ bool more() const { return task_index(round) < arguments.num_tasks; }
  __device__ __forceinline__ void next() {
    if (--tile >= task.begin) return;
    ++round;
    if (!more()) return;
    task = Task(arguments, task_index(round));
    tile = task.end - 1;
  }
  __device__ __forceinline__ int num_tokens() const { return min(task.context_len - tile * TILE, TILE); }
};

// A warp fetches the codes of one side: each lane one page.
__device__ __forceinline__ void fetch_codes(const Arguments& arguments, const Barriers& barriers, const Walk& walk,
                                            int side, int stage) {
  const int lane = threadIdx.x % 32, token = walk.tile * TILE + lane * PAGE_TOKENS;
  const int num_pages = (walk.num_tokens() + PAGE_TOKENS - 1) / PAGE_TOKENS;
  const uint32_t barrier = barriers.staged(side, stage);
  if (lane == 0) mbarrier_arrive_expect(barrier, num_pages * PAGE_TOKENS * HEAD_DIM);
  __syncwarp();
  if (lane >= num_pages) return;
  const long long entry = static_cast<long long>(walk.task.sequence) * arguments.table_stride + token / BLOCK_SIZE;
  const long long page = arguments.block_tables[entry];
  const long long vector = (page * NUM_KV_HEADS + walk.task.kv_head) * BLOCK_SIZE + token % BLOCK_SIZE;
  bulk_load(barriers.shared + STAGED_PLACE + (side * STAGED + stage) * STAGED_BYTES + lane * PAGE_TOKENS * HEAD_DIM,
            (side ? arguments.values : arguments.keys) + vector * HEAD_DIM, PAGE_TOKENS * HEAD_DIM, barrier,
            kCacheEvictNormal);
}

// Two warps turn codes into swizzled rows of fp16; zeros from `num_tokens` on, where there are as many (IS_CUT).
//
// A thread's rows have the same place in their groups of eight. Eight neighbouring threads read 128 bytes of two rows and
// write chunks of 16 bytes to two rows, so that they meet no bank conflict either time.
template <int FORMAT, bool IS_CUT>
__device__ __forceinline__ void widen_codes(unsigned char* target, const unsigned char* source, int num_tokens) {
  constexpr int UNITS = HEAD_DIM / 16;  // of 16 codes in a row
  constexpr int PASS_ROWS = 64 / UNITS, PASSES = TILE / PASS_ROWS;
  constexpr int BATCH = PASSES % 4 == 0 ? 4 : PASSES % 2 == 0 ? 2 : 1;  // loads in flight
  static_assert(TILE % PASS_ROWS == 0 && PASS_ROWS % 8 == 0, "a thread's rows have the same place in their groups");
  const int thread = threadIdx.x % 64, quarter = thread / 4 % 4;
  const int row = HALVES == 2 ? thread / 16 * 2 + quarter % 2 : thread / 4;
  const int half = HALVES == 2 ? quarter % 2 ^ quarter / 2 : 0, unit = half * 4 + thread % 4;
  unsigned char* line = target + row / 8 * GROUP_BYTES + half * 1024 + row % 8 * 128;
  unsigned char* const places[2] = {line + ((unit % 4 * 2) ^ row % 8) * 16, line + ((unit % 4 * 2 + 1) ^ row % 8) * 16};
  source += row * HEAD_DIM + unit * 16;
#pragma unroll 1
  for (int pass = 0; pass < PASSES; pass += BATCH) {
    Vector<unsigned, 4> codes[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      codes[i] = *reinterpret_cast<const Vector<unsigned, 4>*>(source + (pass + i) * PASS_ROWS * HEAD_DIM);
      if (IS_CUT && row + (pass + i) * PASS_ROWS >= num_tokens) codes[i] = {};
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        Vector<unsigned, 4> wide;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const unsigned word = codes[i].items[part * 2 + j / 2];
          if constexpr (item_bytes(FORMAT) == 1) wide.items[j] = decode_pair<FORMAT>(word >> j % 2 * 16);
        }
        *reinterpret_cast<Vector<unsigned, 4>*>(places[part] + (pass + i) * (PASS_ROWS / 8) * GROUP_BYTES) = wide;
      }
    }
  }
}

// Two warps that bring one side of an 8-bit cache; the first of them fetches, too.
template <int FORMAT>
__device__ __forceinline__ void widen_side(const Arguments& arguments, const Barriers& barriers, unsigned char* memory,
                                           int side) {
  const bool is_fetcher = threadIdx.x % 64 < 32;
  Walk walk(arguments), ahead(arguments);
  Ring<STAGED> staged;
  Ring<STAGES> ring;
  for (int stage = 0; is_fetcher && stage < STAGED && ahead.more(); ++stage, ahead.next())
    fetch_codes(arguments, barriers, ahead, side, stage);
#pragma unroll 1
  for (; walk.more(); walk.next(), staged.advance(), ring.advance()) {
    const int num_tokens = walk.num_tokens();
    mbarrier_wait(barriers.staged(side, staged.stage), staged.phase);
    mbarrier_wait(barriers.empty(side, ring.stage), ring.phase ^ 1);
    const unsigned char* source = memory + STAGED_PLACE + (side * STAGED + staged.stage) * STAGED_BYTES;
    unsigned char* target = memory + (side ? VALUES_PLACE : KEYS_PLACE) + ring.stage * SIDE_BYTES;
    if (num_tokens == TILE) {
      widen_codes<FORMAT, false>(target, source, num_tokens);
    } else {
      widen_codes<FORMAT, true>(target, source, num_tokens);
    }
    fence_shared_to_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barriers.full(side, ring.stage));
    named_barrier_sync(1 + 2 * WARPGROUPS + side, 64);  // all codes are read
    if (is_fetcher && ahead.more()) {
      fetch_codes(arguments, barriers, ahead, side, staged.stage);
      ahead.next();
    }
  }
}
