// The whole decoder forward inside one parallel region.
//
// Every step below ends at a barrier. Steps over rows (norms, rotation, quantizing a layer's input) share the rows
// among the threads, linear layers share the outputs.
#pragma once

#include <omp.h>

#include "attention.h"
#include "elementwise.h"
#include "linear_run.h"

namespace AQ_NAMESPACE {

struct Workspace {
  Barrier* barrier;
  float* hidden;     // [tokens][hidden]
  float* qkv;        // [tokens][(heads + 2 kv_heads) * head_dim]
  float* attention;  // [tokens][heads * head_dim]
  float* gate_up;    // [tokens][2 * intermediate]
  void* rows;        // the prepared input of the layer at work
  char* own;         // [threads][own_bytes]: a row, scratch to prepare it, and what attention needs
  int64_t row_floats, own_bytes, num_bytes;
  AttentionPlan plan;
};

struct Arena {
  char* base;
  int64_t used;
  template <typename T>
  T* take(int64_t bytes) {
    T* result = reinterpret_cast<T*>(base + used);
    used += round_up(bytes, 64);
    return result;
  }
};

template <typename Visit>
static inline void for_each_linear(const AqDecoder& decoder, Visit visit) {
  for (int64_t i = 0; i < decoder.num_layers; i++) {
    const AqLayer& layer = decoder.layers[i];
    for (int32_t j = 0; j < layer.num_qkv; j++) visit(layer.qkv[j]);
    for (int32_t j = 0; j < layer.num_gate_up; j++) visit(layer.gate_up[j]);
    visit(layer.o);
    visit(layer.down);
  }
}

static inline int64_t qkv_width(const AqDecoder& decoder) {
  return (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim;
}

static inline Workspace lay_out(const AqDecoder& decoder, const AqBatch& batch, int32_t threads, void* memory) {
  const int64_t tokens = batch.num_tokens, heads = decoder.num_heads * decoder.head_dim;
  int64_t row_floats = max64(max64(decoder.hidden_size, decoder.intermediate_size), heads), rows = 0;
  if (decoder.head != nullptr) {
    rows = rows_bytes(*decoder.head, batch.num_logits);
    row_floats = max64(row_floats, scratch_floats(*decoder.head));
  }
  for_each_linear(decoder, [&](const AqLinear& layer) {
    rows = max64(rows, rows_bytes(layer, tokens));
    row_floats = max64(row_floats, scratch_floats(layer));
  });
  Arena arena = {static_cast<char*>(memory), 0};
  Workspace work;
  work.row_floats = round_up(row_floats, 16);
  work.own_bytes = round_up(max64(8 * work.row_floats, attention_scratch_bytes(decoder)), 64);
  work.barrier = arena.take<Barrier>(sizeof(Barrier));
  work.hidden = arena.take<float>(4 * tokens * decoder.hidden_size);
  work.qkv = arena.take<float>(4 * tokens * qkv_width(decoder));
  work.attention = arena.take<float>(4 * tokens * heads);
  work.gate_up = arena.take<float>(8 * tokens * decoder.intermediate_size);
  work.rows = arena.take<void>(rows);
  work.own = arena.take<char>(threads * work.own_bytes);
  work.plan.blocks = arena.take<QueryBlock>(count_blocks(decoder, batch) * static_cast<int64_t>(sizeof(QueryBlock)));
  work.plan.partials = arena.take<float>(partials_bytes(decoder, batch, threads));
  work.num_bytes = arena.used;
  return work;
}

// One thread's view of a forward.
struct Worker {
  Team team;
  const AqDecoder* decoder;
  const AqBatch* batch;
  const Workspace* work;

  float* own_row() const { return reinterpret_cast<float*>(work->own + team.index * work->own_bytes); }
  float* own_scratch() const { return own_row() + work->row_floats; }
  void* own_memory() const { return own_row(); }

  // `source(row)` gives the input row (in own_row() or elsewhere); out = rows W^T.
  template <typename Source>
  void linear(const AqLinear& layer, int64_t num_rows, Source source, const Output& out) const {
    const Rows rows = rows_at(layer, work->rows, num_rows);
    const int64_t last = team.last(num_rows);
    for (int64_t row = team.first(num_rows); row < last; row++)
      prepare_row(layer, source(row), row, rows, own_scratch());
    team.wait();
    run_linear(team, layer, rows, num_rows, out);
    team.wait();
  }

  const float* normed(const float* x, const float* gain) const {
    rms_norm(x, gain, decoder->hidden_size, decoder->norm_eps, own_row());
    return own_row();
  }

  void rotate_and_store(const AqLayer& layer, int64_t row) const {
    const int64_t head_dim = decoder->head_dim, heads = decoder->num_heads, kv_heads = decoder->num_kv_heads;
    float* q = work->qkv + row * qkv_width(*decoder);
    float* k = q + heads * head_dim;
    const float* v = k + kv_heads * head_dim;
    const float* cos = batch->cos + batch->positions[row] * (head_dim / 2);
    const float* sin = batch->sin + batch->positions[row] * (head_dim / 2);
    for (int64_t head = 0; head < heads + kv_heads; head++) {
      float* x = q + head * head_dim;
      const float* gain = head < heads ? layer.q_norm : layer.k_norm;
      if (gain != nullptr) rms_norm(x, gain, head_dim, decoder->norm_eps, x);
      rotate(x, cos, sin, head_dim);
    }
    const int64_t slot = batch->slot_mapping[row];
    for (int64_t head = 0; head < kv_heads; head++) {
      store_slot(*decoder, decoder->key_type, layer.keys, layer.key_scales, slot, head, k + head * head_dim);
      store_slot(*decoder, decoder->value_type, layer.values, layer.value_scales, slot, head, v + head * head_dim);
    }
  }

  void attention(const AqLayer& layer) const {
    const int64_t tokens = batch->num_tokens, hidden_size = decoder->hidden_size, width = qkv_width(*decoder);
    float* out = work->qkv;
    for (int32_t i = 0; i < layer.num_qkv; i++) {
      const auto source = [&](int64_t row) { return normed(work->hidden + row * hidden_size, layer.input_norm); };
      linear(layer.qkv[i], tokens, source, {out, width, false});
      out += layer.qkv[i].out_features;
    }
    const int64_t last = team.last(tokens);
    for (int64_t row = team.first(tokens); row < last; row++) rotate_and_store(layer, row);
    team.wait();
    const AttentionCall call = {decoder, &layer, batch, &work->plan, work->qkv, width, work->attention};
    run_attention(team, call, own_memory());
    team.wait();
    const int64_t heads = decoder->num_heads * decoder->head_dim;
    linear(layer.o, tokens, [&](int64_t row) { return work->attention + row * heads; },
           {work->hidden, hidden_size, true});
  }

  void mlp(const AqLayer& layer) const {
    const int64_t tokens = batch->num_tokens, hidden_size = decoder->hidden_size;
    const int64_t inner = decoder->intermediate_size;
    float* out = work->gate_up;
    for (int32_t i = 0; i < layer.num_gate_up; i++) {
      const auto source = [&](int64_t row) {
        return normed(work->hidden + row * hidden_size, layer.post_attention_norm);
      };
      linear(layer.gate_up[i], tokens, source, {out, 2 * inner, false});
      out += layer.gate_up[i].out_features;
    }
    const auto source = [&](int64_t row) {
      const float* gate = work->gate_up + row * 2 * inner;
      silu_times(gate, gate + inner, inner, own_row());
      return own_row();
    };
    linear(layer.down, tokens, source, {work->hidden, hidden_size, true});
  }

  void forward(float* logits) const {
    const int64_t tokens = batch->num_tokens, hidden_size = decoder->hidden_size, last = team.last(tokens);
    for (int64_t row = team.first(tokens); row < last; row++) {
      embed(*decoder->embedding, batch->token_ids[row], work->hidden + row * hidden_size);
    }
    team.wait();
    for (int64_t i = 0; i < decoder->num_layers; i++) {
      attention(decoder->layers[i]);
      mlp(decoder->layers[i]);
    }
    const auto source = [&](int64_t row) {
      return normed(work->hidden + batch->logits_rows[row] * hidden_size, decoder->final_norm);
    };
    linear(*decoder->head, batch->num_logits, source, {logits, decoder->vocab_size, false});
  }
};

static int64_t decoder_workspace(const AqDecoder* decoder, const AqBatch* batch, int32_t threads) {
  return lay_out(*decoder, *batch, threads, nullptr).num_bytes;
}

static void decoder_forward(const AqDecoder* decoder, const AqBatch* batch, float* logits, void* memory,
                            int32_t threads) {
  Workspace work = lay_out(*decoder, *batch, threads, memory);
  plan_attention(*decoder, *batch, threads, &work.plan);
  memset(work.barrier, 0, sizeof(Barrier));
#pragma omp parallel num_threads(threads)
  {
    const Worker worker = {{omp_get_thread_num(), omp_get_num_threads(), work.barrier}, decoder, batch, &work};
    worker.forward(logits);
  }
}

static int64_t linear_workspace(const AqLinear* layer, int64_t rows, int32_t threads) {
  return round_up(sizeof(Barrier), 64) + rows_bytes(*layer, rows) + threads * 4 * scratch_floats(*layer);
}

static void linear(const AqLinear* layer, const float* x, int64_t num_rows, float* y, void* memory, int32_t threads) {
  Arena arena = {static_cast<char*>(memory), 0};
  Barrier* barrier = arena.take<Barrier>(sizeof(Barrier));
  const Rows rows = rows_at(*layer, arena.take<char>(rows_bytes(*layer, num_rows)), num_rows);
  float* scratch = arena.take<float>(0);
  memset(barrier, 0, sizeof(Barrier));
#pragma omp parallel num_threads(threads)
  {
    const Team team = {omp_get_thread_num(), omp_get_num_threads(), barrier};
    float* own = scratch + team.index * scratch_floats(*layer);
    const int64_t last = team.last(num_rows);
    for (int64_t row = team.first(num_rows); row < last; row++) {
      prepare_row(*layer, x + row * layer->in_features, row, rows, own);
    }
    team.wait();
    run_linear(team, *layer, rows, num_rows, {y, layer->out_features, false});
  }
}

static void attention(const AqDecoder* decoder, const AqBatch* batch, const float* q, float* out, void* memory,
                      int32_t threads) {
  Workspace work = lay_out(*decoder, *batch, threads, memory);
  plan_attention(*decoder, *batch, threads, &work.plan);
  memset(work.barrier, 0, sizeof(Barrier));
  const int64_t stride = decoder->num_heads * decoder->head_dim;
#pragma omp parallel num_threads(threads)
  {
    const Team team = {omp_get_thread_num(), omp_get_num_threads(), work.barrier};
    const AttentionCall call = {decoder, decoder->layers, batch, &work.plan, q, stride, out};
    run_attention(team, call, work.own + team.index * work.own_bytes);
  }
}

static void store_keys_and_values(const AqDecoder* decoder, const AqBatch* batch, const float* k, const float* v) {
  const int64_t heads = decoder->num_kv_heads, head_dim = decoder->head_dim;
  const AqLayer& layer = decoder->layers[0];
  for (int64_t i = 0; i < batch->num_tokens * heads; i++) {
    const int64_t slot = batch->slot_mapping[i / heads], head = i % heads;
    store_slot(*decoder, decoder->key_type, layer.keys, layer.key_scales, slot, head, k + i * head_dim);
    store_slot(*decoder, decoder->value_type, layer.values, layer.value_scales, slot, head, v + i * head_dim);
  }
}

}  // namespace AQ_NAMESPACE
