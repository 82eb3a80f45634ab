// The paged key/value cache: storing vectors in its number formats and reading them back 16 at a time.
#pragma once

#include "abi.h"
#include "rows.h"

namespace AQ_NAMESPACE {

template <int kType>
struct Stored;
template <>
struct Stored<AQ_CACHE_F32> {
  using Element = float;
  static F32 load16(const float* p) { return load(p); }
};
template <>
struct Stored<AQ_CACHE_F16> {
  using Element = uint16_t;
  static F32 load16(const uint16_t* p) { return load_f16(p); }
};
template <>
struct Stored<AQ_CACHE_BF16> {
  using Element = uint16_t;
  static F32 load16(const uint16_t* p) { return load_bf16(p); }
};
template <>
struct Stored<AQ_CACHE_FP8> {
  using Element = uint8_t;
  static F32 load16(const uint8_t* p) { return load_fp8(p); }
};
template <>
struct Stored<AQ_CACHE_INT8> {
  using Element = int8_t;
  static F32 load16(const int8_t* p) { return load_i8(p); }
};

// `count` <= 16 elements as floats, zeros after them; nothing beyond them is read.
template <int kType>
static inline F32 load_stored(const typename Stored<kType>::Element* p, int64_t count) {
  if (count == 16) return Stored<kType>::load16(p);
  typename Stored<kType>::Element lanes[16] = {};
  memcpy(lanes, p, static_cast<size_t>(count) * sizeof lanes[0]);
  return Stored<kType>::load16(lanes);
}

static inline int64_t stored_bytes(int32_t type) {
  return type == AQ_CACHE_F32 ? 4 : type == AQ_CACHE_F16 || type == AQ_CACHE_BF16 ? 2 : 1;
}

static inline void store_int8(const float* x, int64_t size, int8_t* y, float* scale) {
  const float top = largest_magnitude(x, size);
  *scale = top == 0.0f ? 1.0f : finite_or_nan(top / 127.0f);
  quantize(x, size, *scale, -127, 127, y);
}

// Store one head vector x [size] at `y`. fp8: `scale` is the head's; int8: it is where this vector's scale goes.
static inline void store_vector(int32_t type, const float* x, int64_t size, void* y, float* scale) {
  switch (type) {
    case AQ_CACHE_F32:
      memcpy(y, x, static_cast<size_t>(size) * 4);
      return;
    case AQ_CACHE_F16:
      for (int64_t i = 0; i < size; i++) static_cast<uint16_t*>(y)[i] = to_f16(x[i]);
      return;
    case AQ_CACHE_BF16:
      for (int64_t i = 0; i < size; i++) static_cast<uint16_t*>(y)[i] = to_bf16(x[i]);
      return;
    case AQ_CACHE_FP8:
      for (int64_t i = 0; i < size; i++) static_cast<uint8_t*>(y)[i] = to_fp8(x[i] / *scale);
      return;
    default:
      store_int8(x, size, static_cast<int8_t*>(y), scale);
  }
}

// Store the vector of one head at `slot` = block * block_size + offset.
static inline void store_slot(const AqDecoder& decoder, int32_t type, void* pool, float* scales, int64_t slot,
                              int64_t head, const float* x) {
  const int64_t block = slot / decoder.block_size, offset = slot % decoder.block_size;
  const int64_t vector = (block * decoder.num_kv_heads + head) * decoder.block_size + offset;
  char* target = static_cast<char*>(pool) + vector * decoder.head_dim * stored_bytes(type);
  float* scale = type == AQ_CACHE_INT8 ? scales + vector : type == AQ_CACHE_FP8 ? scales + head : nullptr;
  store_vector(type, x, decoder.head_dim, target, scale);
}

}  // namespace AQ_NAMESPACE
