// Attention of query rows over a paged key/value cache.
//
// A query's result depends on its own vector and its keys and values alone, in one fixed order of operations. Keys are
// taken in segments of 256 positions. Within a segment: scores, their maximum, the weights exp(score - maximum), their
// sum (16 lanes, then across), and one chain of weighted values in ascending order. Segments are merged in ascending
// order. So the segments of a long context can be shared among threads, and neither the cutting of a prompt into chunks
// nor the batch changes a bit. (An online softmax over small tiles would cost an exponential and two reductions for
// each.)
#pragma once

#include "attention_plan.h"
#include "attention_tiles.h"
#include "team.h"

namespace AQ_NAMESPACE {

constexpr int64_t kTransposeFrom = 8;  // queries from which transposing the keys pays
constexpr int kTogether = 4;           // queries that share the loads of a tile
constexpr int64_t kTilesAhead = 2;     // distance of prefetching

struct AttentionCall {
  const AqDecoder* decoder;
  const AqLayer* layer;
  const AqBatch* batch;
  const AttentionPlan* plan;
  const float* q;  // [tokens], `q_stride` apart: [heads][head_dim]
  int64_t q_stride;
  float* out;  // [tokens][heads][head_dim]
};

// A softmax under way ("state"): [dim] weighted values, then the largest score and the sum of weights.
static inline void reset_state(float* state, int64_t dim) {
  memset(state, 0, static_cast<size_t>(dim + 16) * 4);
  state[dim] = -__builtin_inff();
}

static inline void merge_state(float* into, const float* from, int64_t dim) {
  const float top = into[dim] > from[dim] ? into[dim] : from[dim];
  const float a = exp_scalar(into[dim] - top), b = exp_scalar(from[dim] - top);
  into[dim] = top;
  into[dim + 1] = into[dim + 1] * a + from[dim + 1] * b;
  for (int64_t i = 0; i < dim; i += 16) {
    store(into + i, fma(load(from + i), broadcast(b), mul(load(into + i), broadcast(a))));
  }
}

static inline void finish_state(const float* state, int64_t dim, int64_t head_dim, float* out) {
  const float factor = 1.0f / state[dim + 1];
  for (int64_t i = 0; i < head_dim; i++) out[i] = state[i] * factor;
}

// Some keys and values of one KV head, at consecutive positions inside one block.
struct KeyTile {
  const void* keys;  // [len][head_dim]
  const void* values;
  F32 key_factors;    // what a key's product is multiplied by: softmax scale, times the key's scale
  F32 value_factors;  // the values' scales
  int64_t first_position, len;
};

// The queries of one task: the tokens of a block times the heads that share KV head `head`.
struct QueryTask {
  const AttentionCall* call;
  const QueryBlock* block;
  int64_t head, group, dim, head_dim;
  TileFunctions keys, values;
  AttentionScratch scratch;

  int64_t num_queries() const { return block->count * group; }
  int64_t position(int64_t query) const { return block->first_position + query / group; }
  int64_t last_position() const { return block->first_position + block->count - 1; }
  int64_t row(int64_t query) const { return block->first_row + query / group; }
  int64_t head_of(int64_t query) const { return head * group + query % group; }
  int64_t first_key(int64_t query) const {  // ascends with the query
    const int64_t window = call->layer->sliding_window;
    return window > 0 ? max64(0, position(query) - window + 1) : 0;
  }
  const float* q(int64_t query) const { return scratch.queries + query * dim; }
  float* weights(int64_t query) const { return scratch.weights + query * kSegment; }
  float* state(int64_t query) const { return scratch.states + query * (dim + 16); }
  float* total(int64_t query) const { return scratch.totals + query * (dim + 16); }
  float* output(int64_t query) const {
    return call->out + (row(query) * call->decoder->num_heads + head_of(query)) * head_dim;
  }
  float* partial(int64_t query, int64_t segment) const {
    const int64_t index = row(query) * call->decoder->num_heads + head_of(query);
    return call->plan->partials + (index * call->plan->num_segments + segment) * (dim + 16);
  }
};

static inline QueryTask query_task(const AttentionCall& call, int64_t index, void* memory) {
  const AqDecoder& decoder = *call.decoder;
  QueryTask task;
  task.call = &call;
  task.block = call.plan->blocks + index / decoder.num_kv_heads;
  task.head = index % decoder.num_kv_heads;
  task.group = decoder.num_heads / decoder.num_kv_heads;
  task.dim = padded_dim(decoder);
  task.head_dim = decoder.head_dim;
  task.keys = tile_functions(decoder.key_type, decoder.head_dim);
  task.values = tile_functions(decoder.value_type, decoder.head_dim);
  task.scratch = attention_scratch(decoder, memory);
  return task;
}

static inline F32 scales_at(int32_t type, const float* scales, int64_t vector, int64_t len, int64_t head) {
  if (type == AQ_CACHE_INT8) return load_first(scales + vector, len);
  return broadcast(type == AQ_CACHE_FP8 ? scales[head] : 1.0f);
}

static inline KeyTile tile_at(const QueryTask& task, int64_t position, int64_t end) {
  const AqDecoder& decoder = *task.call->decoder;
  const AqLayer& layer = *task.call->layer;
  const AqBatch& batch = *task.call->batch;
  const int64_t offset = position % decoder.block_size;
  const int64_t block = batch.block_tables[task.block->sequence * batch.max_blocks + position / decoder.block_size];
  const int64_t vector = (block * decoder.num_kv_heads + task.head) * decoder.block_size + offset;
  KeyTile tile;
  tile.first_position = position;
  tile.len = min64(min64(16, decoder.block_size - offset), end - position);
  tile.keys = static_cast<const char*>(layer.keys) + vector * decoder.head_dim * stored_bytes(decoder.key_type);
  tile.values = static_cast<const char*>(layer.values) + vector * decoder.head_dim * stored_bytes(decoder.value_type);
  const F32 key_scales = scales_at(decoder.key_type, layer.key_scales, vector, tile.len, task.head);
  tile.key_factors = mul(broadcast(decoder.softmax_scale), key_scales);
  tile.value_factors = scales_at(decoder.value_type, layer.value_scales, vector, tile.len, task.head);
  return tile;
}

// The keys of `segment` that a query sees: first .. last - 1, counted from the segment's start.
struct Visible {
  int64_t first, last;
};

static inline Visible visible(const QueryTask& task, int64_t query, int64_t segment) {
  const int64_t start = segment * kSegment;
  return {max64(0, task.first_key(query) - start), min64(kSegment, task.position(query) + 1 - start)};
}

// The scores of queries `query` .. with a tile; their factors for the tile's values are kept beside them.
template <typename Products>
static inline void store_scores(const QueryTask& task, int64_t query, int64_t count, const KeyTile& tile,
                                const Products& products) {
  const int64_t at = tile.first_position % kSegment;
  for (int64_t r = 0; r < count; r++) {
    store_first(task.weights(query + r) + at, mul(products[r], tile.key_factors), tile.len);
  }
  store_first(task.scratch.factors + at, tile.value_factors, tile.len);
}

static void score_tile(const QueryTask& task, const KeyTile& tile, bool transposed) {
  const int64_t num_queries = task.num_queries();
  if (transposed) task.keys.expand(tile.keys, tile.len, task.head_dim, task.scratch.tile, true);
  for (int64_t query = 0; query < num_queries;) {
    F32 products[kTogether];
    const int64_t count = min64(kTogether, num_queries - query);
    if (!transposed) {
      task.keys.products[count - 1](task.q(query), task.dim, tile.keys, tile.len, task.head_dim, products);
    } else if (count == kTogether) {
      transposed_products<kTogether, 0, 1>(task.q(query), task.dim, task.scratch.tile, products);
    } else {
      for (int64_t r = 0; r < count; r++) {
        transposed_products<1, 0, 1>(task.q(query + r), task.dim, task.scratch.tile, products + r);
      }
    }
    store_scores(task, query, count, tile, products);
    query += count;
  }
}

// Scores become weights, zero where the query does not look; the state gets their maximum and sum.
static void weigh(const QueryTask& task, int64_t query, const Visible& range) {
  float* weights = task.weights(query);
  const int64_t first = range.first / 16 * 16;
  F32 top = broadcast(-__builtin_inff());
  for (int64_t i = first; i < range.last; i += 16) {
    const F32 scores = load(weights + i);
    const F32 seen = select_lanes(scores, max64(0, range.first - i), min64(16, range.last - i), -__builtin_inff());
    store(weights + i, seen);
    top = max(top, seen);
  }
  const float maximum = largest(top);
  F32 total = zero();
  for (int64_t i = first; i < range.last; i += 16) {
    const F32 p = exp(sub(load(weights + i), broadcast(maximum)));
    total = add(total, p);
    store(weights + i, mul(p, load(task.scratch.factors + i)));
  }
  task.state(query)[task.dim] = maximum;
  task.state(query)[task.dim + 1] = sum(total);
}

// Add a tile's values to queries query .. query + count - 1 where they look at it. `values` is as add_values wants it.
static inline void mix_queries(const QueryTask& task, int64_t query, int64_t count, const KeyTile& tile,
                               const TileFunctions& functions, const void* values, int64_t value_dim) {
  const int64_t segment = tile.first_position / kSegment, at = tile.first_position % kSegment;
  const Visible narrow = {visible(task, query + count - 1, segment).first, visible(task, query, segment).last};
  if (narrow.first <= at && narrow.last >= at + tile.len) {
    functions.add[count - 1](task.state(query), task.dim + 16, task.weights(query) + at, kSegment, values, 0, tile.len,
                             value_dim);
    return;
  }
  for (int64_t r = query; r < query + count; r++) {
    const Visible range = visible(task, r, segment);
    const int64_t first = max64(0, range.first - at), last = min64(tile.len, range.last - at);
    if (first >= last) continue;
    functions.add[0](task.state(r), 0, task.weights(r) + at, 0, values, first, last, value_dim);
  }
}

static void mix_tile(const QueryTask& task, const KeyTile& tile, bool expanded) {
  const TileFunctions floats = tile_functions(AQ_CACHE_F32, task.dim);
  if (expanded) task.values.expand(tile.values, tile.len, task.head_dim, task.scratch.tile, false);
  for (int64_t query = 0; query < task.num_queries(); query += kTogether) {
    const int64_t count = min64(kTogether, task.num_queries() - query);
    if (expanded) {
      mix_queries(task, query, count, tile, floats, task.scratch.tile, task.dim);
    } else {
      mix_queries(task, query, count, tile, task.values, tile.values, task.head_dim);
    }
  }
}

static void load_queries(const QueryTask& task) {
  const AttentionCall& call = *task.call;
  for (int64_t query = 0; query < task.num_queries(); query++) {
    float* q = task.scratch.queries + query * task.dim;
    memset(q, 0, static_cast<size_t>(task.dim) * 4);
    const float* source = call.q + task.row(query) * call.q_stride + task.head_of(query) * task.head_dim;
    memcpy(q, source, static_cast<size_t>(task.head_dim) * 4);
  }
}

// Keys and values of a head lie in pieces of a block, too short for the processor to see them coming.
static inline void prefetch_tile(const QueryTask& task, int64_t position, int64_t end) {
  if (position >= end) return;
  const KeyTile tile = tile_at(task, position, end);
  const int64_t key_bytes = tile.len * task.head_dim * stored_bytes(task.call->decoder->key_type);
  const int64_t value_bytes = tile.len * task.head_dim * stored_bytes(task.call->decoder->value_type);
  for (int64_t i = 0; i < key_bytes; i += 64) prefetch(tile.keys, i);
  for (int64_t i = 0; i < value_bytes; i += 64) prefetch(tile.values, i);
}

// Fill the states of all queries for one segment.
static void attend_segment(const QueryTask& task, int64_t segment) {
  const int64_t start = max64(segment * kSegment, task.first_key(0));
  const int64_t end = min64((segment + 1) * kSegment, task.last_position() + 1);
  const bool many = task.num_queries() >= kTransposeFrom;
  for (int64_t ahead = 0; ahead < kTilesAhead; ahead++) prefetch_tile(task, start + ahead * 16, end);
  for (int64_t position = start; position < end;) {
    const KeyTile tile = tile_at(task, position, end);
    prefetch_tile(task, position + kTilesAhead * 16, end);
    score_tile(task, tile, many);
    position += tile.len;
  }
  for (int64_t query = 0; query < task.num_queries(); query++) {
    reset_state(task.state(query), task.dim);
    const Visible range = visible(task, query, segment);
    if (range.first < range.last) weigh(task, query, range);
  }
  for (int64_t position = start; position < end;) {
    const KeyTile tile = tile_at(task, position, end);
    mix_tile(task, tile, many);
    position += tile.len;
  }
}

static void attend_all_segments(const QueryTask& task) {
  for (int64_t query = 0; query < task.num_queries(); query++) reset_state(task.total(query), task.dim);
  for (int64_t segment = task.first_key(0) / kSegment; segment * kSegment <= task.last_position(); segment++) {
    attend_segment(task, segment);
    for (int64_t query = 0; query < task.num_queries(); query++) {
      const Visible range = visible(task, query, segment);
      if (range.first < range.last) merge_state(task.total(query), task.state(query), task.dim);
    }
  }
  for (int64_t query = 0; query < task.num_queries(); query++) {
    finish_state(task.total(query), task.dim, task.head_dim, task.output(query));
  }
}

static void attend_one_segment(const QueryTask& task, int64_t segment) {
  attend_segment(task, segment);
  for (int64_t query = 0; query < task.num_queries(); query++) {
    memcpy(task.partial(query, segment), task.state(query), static_cast<size_t>(task.dim + 16) * 4);
  }
}

static void merge_segments(const QueryTask& task) {
  for (int64_t query = 0; query < task.num_queries(); query++) {
    float* total = task.total(query);
    reset_state(total, task.dim);
    for (int64_t segment = task.first_key(query) / kSegment; segment * kSegment <= task.position(query); segment++) {
      merge_state(total, task.partial(query, segment), task.dim);
    }
    finish_state(total, task.dim, task.head_dim, task.output(query));
  }
}

// This thread's share. The caller waits for the team afterwards.
static void run_attention(const Team& team, const AttentionCall& call, void* memory) {
  const AttentionPlan& plan = *call.plan;
  const int64_t num_tasks = plan.num_blocks * call.decoder->num_kv_heads;
  if (!plan.split) {
    for (int64_t index = num_tasks - 1 - team.index; index >= 0; index -= team.size) {  // the longest contexts first
      const QueryTask task = query_task(call, index, memory);
      load_queries(task);
      attend_all_segments(task);
    }
    return;
  }
  for (int64_t index = team.index; index < num_tasks * plan.num_segments; index += team.size) {
    const QueryTask task = query_task(call, index % num_tasks, memory);
    const int64_t segment = index / num_tasks;
    if (segment * kSegment > task.last_position() || task.first_key(0) >= (segment + 1) * kSegment) continue;
    load_queries(task);
    attend_one_segment(task, segment);
  }
  team.wait();
  for (int64_t index = team.index; index < num_tasks; index += team.size)
    merge_segments(query_task(call, index, memory));
}

}  // namespace AQ_NAMESPACE
