// How the attention of a batch is cut into tasks, and the memory that one task needs.
#pragma once

#include "abi.h"
#include "simd.h"

namespace AQ_NAMESPACE {

constexpr int64_t kSegment = 256;     // keys (attention.h)
constexpr int64_t kTaskQueries = 48;  // queries (tokens x heads of a group) of a task, about

struct QueryBlock {  // consecutive tokens of one sequence
  int64_t sequence, first_row, count, first_position;
};

struct AttentionPlan {
  QueryBlock* blocks;
  int64_t num_blocks, num_segments;  // num_segments: of the longest context
  bool split;                        // segments are tasks of their own
  float* partials;                   // [tokens][heads][num_segments][state]
};

static inline int64_t padded_dim(const AqDecoder& decoder) { return round_up(decoder.head_dim, 16); }
static inline int64_t state_size(const AqDecoder& decoder) { return padded_dim(decoder) + 16; }
static inline int64_t heads_of_group(const AqDecoder& decoder) { return decoder.num_heads / decoder.num_kv_heads; }
static inline int64_t task_tokens(const AqDecoder& decoder) { return max64(1, kTaskQueries / heads_of_group(decoder)); }

// Segments become tasks when there are too few tasks without.
static inline bool plan_splits(const AqDecoder& decoder, const AqBatch& batch, int64_t num_blocks, int64_t threads) {
  return threads > 1 && batch.max_context > kSegment && num_blocks * decoder.num_kv_heads < 4 * threads;
}

static inline int64_t count_blocks(const AqDecoder& decoder, const AqBatch& batch) {
  const int64_t tokens = task_tokens(decoder);
  int64_t count = 0;
  for (int64_t s = 0; s < batch.num_sequences; s++) {
    count += (batch.query_start[s + 1] - batch.query_start[s] + tokens - 1) / tokens;
  }
  return count;
}

static inline int64_t partials_bytes(const AqDecoder& decoder, const AqBatch& batch, int64_t threads) {
  if (!plan_splits(decoder, batch, count_blocks(decoder, batch), threads)) return 0;
  const int64_t segments = (batch.max_context + kSegment - 1) / kSegment;
  return 4 * batch.num_tokens * decoder.num_heads * segments * state_size(decoder);
}

static inline void plan_attention(const AqDecoder& decoder, const AqBatch& batch, int64_t threads,
                                  AttentionPlan* plan) {
  const int64_t tokens = task_tokens(decoder);
  plan->num_blocks = 0;
  for (int64_t s = 0; s < batch.num_sequences; s++) {
    const int64_t start = batch.query_start[s], end = batch.query_start[s + 1];
    for (int64_t row = start; row < end; row += tokens) {
      const int64_t position = batch.context_lens[s] - (end - row);
      plan->blocks[plan->num_blocks++] = {s, row, min64(tokens, end - row), position};
    }
  }
  plan->num_segments = (batch.max_context + kSegment - 1) / kSegment;
  plan->split = plan_splits(decoder, batch, plan->num_blocks, threads);
}

// A task's own memory.
struct AttentionScratch {
  float* queries;  // [queries][dim]
  float* weights;  // [queries][kSegment]: scores, then weights
  float* factors;  // [kSegment]: scales of the segment's values
  float* states;   // [queries][dim + 16], of the segment
  float* totals;   // [queries][dim + 16], of the segments so far
  float* tile;     // [dim][16] or [16][dim]
};

static inline AttentionScratch attention_scratch(const AqDecoder& decoder, void* memory) {
  const int64_t queries = task_tokens(decoder) * heads_of_group(decoder);
  AttentionScratch scratch;
  scratch.queries = static_cast<float*>(memory);
  scratch.weights = scratch.queries + queries * padded_dim(decoder);
  scratch.factors = scratch.weights + queries * kSegment;
  scratch.states = scratch.factors + kSegment;
  scratch.totals = scratch.states + queries * state_size(decoder);
  scratch.tile = scratch.totals + queries * state_size(decoder);
  return scratch;
}

static inline int64_t attention_scratch_bytes(const AqDecoder& decoder) {
  const AttentionScratch end = attention_scratch(decoder, nullptr);
  return reinterpret_cast<int64_t>(end.tile) + 4 * 16 * padded_dim(decoder);
}

}  // namespace AQ_NAMESPACE
