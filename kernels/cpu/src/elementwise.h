// What happens to single rows between the linear layers.
#pragma once

#include <math.h>

#include "linear.h"

namespace AQ_NAMESPACE {

static inline void rms_norm(const float* x, const float* gain, int64_t size, float eps, float* y) {
  F32 squares = zero();
  for (int64_t i = 0; i < size; i += 16) {
    const F32 lanes = i + 16 <= size ? load(x + i) : load_first(x + i, size - i);
    squares = fma(lanes, lanes, squares);
  }
  const float factor = 1.0f / sqrtf(sum(squares) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; i++) y[i] = gain[i] * (x[i] * factor);
}

// Rotate one head in place: channel j pairs with channel j + head_dim / 2.
static inline void rotate(float* x, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t j = 0; j < half; j++) {
    const float first = x[j], second = x[j + half];
    x[j] = first * cos[j] - second * sin[j];
    x[j + half] = second * cos[j] + first * sin[j];
  }
}

// y = silu(gate) * up
static inline void silu_times(const float* gate, const float* up, int64_t size, float* y) {
  for (int64_t i = 0; i < size; i += 16) {
    const int64_t lanes = min64(16, size - i);
    const F32 g = lanes == 16 ? load(gate + i) : load_first(gate + i, lanes);
    const F32 u = lanes == 16 ? load(up + i) : load_first(up + i, lanes);
    const F32 silu = div(g, add(broadcast(1.0f), exp(sub(zero(), g))));
    store_first(y + i, mul(silu, u), lanes);
  }
}

// Row `row` of a weight as floats (an embedding).
static inline float code_at(const AqLinear& layer, int64_t row, int64_t column) {
  const int64_t columns = 32 / layer.bits, step = column % columns / 4;
  const int64_t line = row / 16 * (layer.padded_in / columns) + column / columns;
  const uint8_t byte = static_cast<const uint8_t*>(layer.codes)[line * 64 + row % 16 * 4 + column % 4];
  return static_cast<float>((byte >> (step * layer.bits)) & ((1 << layer.bits) - 1));
}

static inline void embed_codes(const AqLinear& layer, int64_t row, float* y) {
  for (int64_t chunk = 0; chunk < layer.num_chunks; chunk++) {
    const int64_t group = (row / 16 * layer.num_groups + layer.chunk_groups[chunk]) * 16;
    float scales[16], offsets[16];
    store(scales, load_scale(layer.scales, layer.scale_type, group));
    store(offsets, load_offset(layer, group));
    const float scale = scales[row % 16], offset = offsets[row % 16];
    for (int64_t column = chunk * layer.chunk_len; column < (chunk + 1) * layer.chunk_len; column++) {
      const int64_t target = layer.columns == nullptr ? column : layer.columns[column];
      if (target < 0) continue;
      const float code = code_at(layer, row, column);
      if (layer.table != nullptr) {
        y[target] = layer.table[static_cast<int>(code)] * scale;
        continue;
      }
      y[target] = layer.offset_kind == AQ_ZEROS_U8 ? (code - offset) * scale : code * scale + offset;
    }
  }
}

template <int kKind>
static inline void embed_dense(const AqLinear& layer, int64_t row, float* y) {
  const int64_t k = layer.in_features, whole = k / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) store(y + i, load_dense<kKind>(layer.codes, row * k + i));
  if (whole < k) store_first(y + whole, load_dense_first<kKind>(layer.codes, row * k + whole, k - whole), k - whole);
}

static inline void embed(const AqLinear& layer, int64_t row, float* y) {
  switch (layer.kind) {
    case AQ_DENSE_F32:
      return embed_dense<AQ_DENSE_F32>(layer, row, y);
    case AQ_DENSE_F16:
      return embed_dense<AQ_DENSE_F16>(layer, row, y);
    case AQ_DENSE_BF16:
      return embed_dense<AQ_DENSE_BF16>(layer, row, y);
    default:
      return embed_codes(layer, row, y);
  }
}

}  // namespace AQ_NAMESPACE
