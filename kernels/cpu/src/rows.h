// Input rows as a layer wants them: in the weight's column order, and quantized.
//
// A chunk of an integer layer's row that holds NaN or infinity gets the scale NaN, so that the whole row comes out NaN
// and no other row is touched.
#pragma once

#include <float.h>

#include "abi.h"
#include "numbers.h"

namespace AQ_NAMESPACE {

// Rows prepared for one layer, in one buffer: int8 codes with the scale and the sum of each chunk, or floats.
struct Rows {
  float* values;  // [rows][padded_in], float layers
  int8_t* codes;  // [rows][padded_in], integer layers
  float* scales;  // [rows][num_chunks]
  float* sums;    // [rows][num_chunks]
  int64_t stride, num_chunks;
};

static inline int64_t rows_bytes(const AqLinear& layer, int64_t rows) {
  if (!layer.integer_dot) return round_up(rows * layer.padded_in * 4, 64);
  return round_up(rows * layer.padded_in, 64) + 2 * round_up(rows * layer.num_chunks * 4, 64);
}

static inline Rows rows_at(const AqLinear& layer, void* buffer, int64_t rows) {
  char* base = static_cast<char*>(buffer);
  if (!layer.integer_dot) return {reinterpret_cast<float*>(base), nullptr, nullptr, nullptr, layer.padded_in, 0};
  float* scales = reinterpret_cast<float*>(base + round_up(rows * layer.padded_in, 64));
  float* sums = scales + round_up(rows * layer.num_chunks * 4, 64) / 4;
  return {nullptr, reinterpret_cast<int8_t*>(base), scales, sums, layer.padded_in, layer.num_chunks};
}

static inline float largest_magnitude(const float* x, int64_t count) {
  I32 top = zero_int();
  for (int64_t i = 0; i < count; i += 16) {
    top = max(top, magnitude_bits(i + 16 <= count ? load(x + i) : load_first(x + i, count - i)));
  }
  return float_of(static_cast<uint32_t>(largest(top)));
}

static inline float finite_or_nan(float x) { return x <= FLT_MAX ? x : __builtin_nanf(""); }
static inline float divisor(float scale) { return scale == 0.0f ? 1.0f : scale; }

// y = the codes of x / scale, low .. high; returns their sum.
static inline int32_t quantize(const float* x, int64_t count, float scale, int32_t low, int32_t high, int8_t* y) {
  const F32 denominator = broadcast(divisor(scale));
  I32 total = zero_int();
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t lanes = min64(16, count - i);
    const F32 values = lanes == 16 ? load(x + i) : load_first(x + i, lanes);
    const I32 codes = clamp(to_nearest_int(div(values, denominator)), low, high);
    store_i8(y + i, codes, lanes);
    total = add(total, codes);
  }
  return sum(total);
}

static inline void quantize_row(const AqLinear& layer, const float* x, float row_scale, int64_t row, const Rows& rows) {
  const int32_t high = layer.input_levels, low = -high - 1;
  for (int64_t chunk = 0; chunk < layer.num_chunks; chunk++) {
    const float* source = x + chunk * layer.chunk_len;
    int8_t* codes = rows.codes + row * rows.stride + chunk * layer.chunk_len;
    float scale = row_scale;
    if (layer.input_kind == AQ_INPUT_INT_CHUNK) {
      scale = finite_or_nan(largest_magnitude(source, layer.chunk_len) / static_cast<float>(high));
    } else if (layer.input_kind == AQ_INPUT_INT_STATIC) {
      const float top = largest_magnitude(source, layer.chunk_len);
      scale = top == top ? scale : top;
    }
    rows.scales[row * rows.num_chunks + chunk] = scale;
    rows.sums[row * rows.num_chunks + chunk] =
        static_cast<float>(quantize(source, layer.chunk_len, scale, low, high, codes));
  }
}

// Values that an 8-bit input would have, as floats: x / scale, rounded, times scale.
static inline void round_through_int(const float* x, int64_t count, float scale, int32_t levels, float* y) {
  const float high = static_cast<float>(levels), low = -high - 1.0f, denominator = divisor(scale);
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t lanes = min64(16, count - i);
    const F32 values = div(lanes == 16 ? load(x + i) : load_first(x + i, lanes), broadcast(denominator));
    const F32 clamped = min(broadcast(high), max(broadcast(low), values));  // NaN stays
    store_first(y + i, mul(round(clamped), broadcast(scale)), lanes);
  }
}

static inline void round_through_fp8(const float* x, int64_t count, float scale, float* y) {
  const float denominator = divisor(scale);
  for (int64_t i = 0; i < count; i++) y[i] = nearest_fp8(x[i] / denominator) * scale;
}

static inline void round_through_input(const AqLinear& layer, const float* x, float* y) {
  const int64_t k = layer.in_features;
  const bool integers = layer.input_kind <= AQ_INPUT_INT_GROUP;
  const bool fixed = layer.input_kind == AQ_INPUT_INT_STATIC || layer.input_kind == AQ_INPUT_FP8_STATIC;
  const bool grouped = layer.input_kind == AQ_INPUT_INT_GROUP || layer.input_kind == AQ_INPUT_FP8_GROUP;
  const int64_t group = grouped ? layer.input_group : k;
  const float top = integers ? static_cast<float>(layer.input_levels) : kLargestFp8;
  for (int64_t start = 0; start < k; start += group) {
    const int64_t count = min64(group, k - start);
    const float scale = fixed ? layer.input_scale : finite_or_nan(largest_magnitude(x + start, count) / top);
    if (integers) {
      round_through_int(x + start, count, scale, layer.input_levels, y + start);
    } else {
      round_through_fp8(x + start, count, scale, y + start);
    }
  }
}

static inline void gather(const AqLinear& layer, const float* x, float* y) {
  if (layer.columns == nullptr) {
    memcpy(y, x, static_cast<size_t>(layer.in_features) * 4);
    return;
  }
  for (int64_t i = 0; i < layer.padded_in; i++) y[i] = layer.columns[i] < 0 ? 0.0f : x[layer.columns[i]];
}

static inline int64_t scratch_floats(const AqLinear& layer) {
  return round_up(max64(layer.in_features, layer.padded_in), 16);
}

// Prepare x [in_features] as row `row`. `scratch` holds scratch_floats(layer).
static inline void prepare_row(const AqLinear& layer, const float* x, int64_t row, const Rows& rows, float* scratch) {
  if (!layer.integer_dot) {
    if (layer.input_kind != AQ_INPUT_NONE) {
      round_through_input(layer, x, scratch);
      x = scratch;
    }
    gather(layer, x, rows.values + row * rows.stride);
    return;
  }
  float row_scale = layer.input_scale;
  if (layer.input_kind == AQ_INPUT_INT_ROW) {
    row_scale = finite_or_nan(largest_magnitude(x, layer.in_features) / static_cast<float>(layer.input_levels));
  }
  if (layer.columns != nullptr) {
    gather(layer, x, scratch);
    x = scratch;
  }
  quantize_row(layer, x, row_scale, row, rows);
}

}  // namespace AQ_NAMESPACE
