// One tile of at most 16 keys and values against one query or several: products and weighted sums.
//
// Products are reached by two routes. Few queries: each key's products are summed across the lanes (sum_each). Many
// queries: the keys are transposed once, and the partial sums that lane l would have had are added in the order of
// sum(). Both add the same numbers in the same order, so both give the same bits.
#pragma once

#include "cache.h"

namespace AQ_NAMESPACE {

// 16 elements at p; with kWhole false only `count` of them, then zeros.
template <int kType, bool kWhole>
static inline F32 load_lanes(const typename Stored<kType>::Element* p, int64_t count) {
  if constexpr (kWhole) return Stored<kType>::load16(p);
  return load_stored<kType>(p, count);
}

// products[r]: of query r (q, `dim` floats apart) with keys 0 .. len - 1 of [len][head_dim], a key a lane.
template <int kType, int kQueries, bool kWhole>
static inline void key_products(const float* q, int64_t dim, const void* keys, int64_t len, int64_t head_dim,
                                F32* products) {
  using Element = typename Stored<kType>::Element;
  F32 partial[kQueries][16];
  for (int64_t j = 0; j < 16; j++) {
    F32 total[kQueries];
    AQ_UNROLL
    for (int r = 0; r < kQueries; r++) total[r] = zero();
    const Element* key = static_cast<const Element*>(keys) + j * head_dim;
    for (int64_t i = 0; i < head_dim && j < len; i += 16) {
      const F32 lanes = load_lanes<kType, kWhole>(key + i, min64(16, head_dim - i));
      AQ_UNROLL
      for (int r = 0; r < kQueries; r++) total[r] = fma(lanes, load(q + r * dim + i), total[r]);
    }
    AQ_UNROLL
    for (int r = 0; r < kQueries; r++) partial[r][j] = total[r];
  }
  AQ_UNROLL
  for (int r = 0; r < kQueries; r++) products[r] = sum_each(partial[r]);
}

// sums[r] += weights[r][j] * values[j] for j = first .. last - 1; sums are `dim`, weights `weight_stride` floats apart.
template <int kType, int kQueries, bool kWhole>
static inline void add_values(float* sums, int64_t dim, const float* weights, int64_t weight_stride, const void* values,
                              int64_t first, int64_t last, int64_t head_dim) {
  using Element = typename Stored<kType>::Element;
  constexpr int kWidth = kQueries > 4 ? 1 : 2;  // vectors of a value at a time
  for (int64_t i = 0; i < head_dim; i += 16 * kWidth) {
    F32 total[kQueries][kWidth];
    int64_t at[kWidth];
    AQ_UNROLL
    for (int w = 0; w < kWidth; w++) {
      at[w] = min64(i + 16 * w, (head_dim - 1) / 16 * 16);  // a vector beyond the end repeats the last
      AQ_UNROLL
      for (int r = 0; r < kQueries; r++) total[r][w] = load(sums + r * dim + at[w]);
    }
    for (int64_t j = first; j < last; j++) {
      const Element* value = static_cast<const Element*>(values) + j * head_dim;
      F32 lanes[kWidth];
      AQ_UNROLL
      for (int w = 0; w < kWidth; w++) lanes[w] = load_lanes<kType, kWhole>(value + at[w], min64(16, head_dim - at[w]));
      AQ_UNROLL
      for (int r = 0; r < kQueries; r++) {
        const F32 weight = broadcast(weights[r * weight_stride + j]);
        AQ_UNROLL
        for (int w = 0; w < kWidth; w++) total[r][w] = fma(weight, lanes[w], total[r][w]);
      }
    }
    AQ_UNROLL
    for (int w = 0; w < kWidth; w++) {
      AQ_UNROLL
      for (int r = 0; r < kQueries; r++) store(sums + r * dim + at[w], total[r][w]);
    }
  }
}

// A tile as floats, the rest of 16 keys and of `dim` as zeros: [16][dim], or transposed [dim][16].
template <int kType>
static inline void expand_tile(const void* stored, int64_t len, int64_t head_dim, float* out, bool transposed) {
  using Element = typename Stored<kType>::Element;
  const int64_t dim = round_up(head_dim, 16);
  for (int64_t i = 0; i < head_dim; i += 16) {
    F32 rows[16];
    for (int64_t j = 0; j < 16; j++) {
      const Element* vector = static_cast<const Element*>(stored) + j * head_dim + i;
      rows[j] = j < len ? load_stored<kType>(vector, min64(16, head_dim - i)) : zero();
    }
    if (transposed) transpose(rows);
    for (int64_t j = 0; j < 16; j++) store(transposed ? out + (i + j) * 16 : out + j * dim + i, rows[j]);
  }
}

// Products of kQueries queries with 16 transposed keys [dim][16], a key a lane: lane partial sums kLane + kStride * n.
template <int kQueries, int kLane, int kStride>
static inline void transposed_products(const float* q, int64_t dim, const float* keys, F32* products) {
  if constexpr (kStride == 16) {
    AQ_UNROLL
    for (int r = 0; r < kQueries; r++) products[r] = zero();
    for (int64_t i = kLane; i < dim; i += 16) {
      const F32 key = load(keys + i * 16);
      AQ_UNROLL
      for (int r = 0; r < kQueries; r++) products[r] = fma(key, broadcast(q[r * dim + i]), products[r]);
    }
  } else {
    F32 other[kQueries];
    transposed_products<kQueries, kLane, kStride * 2>(q, dim, keys, products);
    transposed_products<kQueries, kLane + kStride, kStride * 2>(q, dim, keys, other);
    AQ_UNROLL
    for (int r = 0; r < kQueries; r++) products[r] = add(products[r], other[r]);
  }
}

// The functions above for a cache type that is known at run time only.
using KeyProducts = void (*)(const float*, int64_t, const void*, int64_t, int64_t, F32*);
using AddValues = void (*)(float*, int64_t, const float*, int64_t, const void*, int64_t, int64_t, int64_t);
using ExpandTile = void (*)(const void*, int64_t, int64_t, float*, bool);

struct TileFunctions {
  KeyProducts products[4];  // of 1 .. 4 queries
  AddValues add[4];
  ExpandTile expand;
};

template <int kType, bool kWhole>
static inline TileFunctions functions_of() {
  return {{key_products<kType, 1, kWhole>, key_products<kType, 2, kWhole>, key_products<kType, 3, kWhole>,
           key_products<kType, 4, kWhole>},
          {add_values<kType, 1, kWhole>, add_values<kType, 2, kWhole>, add_values<kType, 3, kWhole>,
           add_values<kType, 4, kWhole>},
          expand_tile<kType>};
}

static inline TileFunctions tile_functions(int32_t type, int64_t head_dim) {
  const bool whole = head_dim % 16 == 0;
  switch (type) {
    case AQ_CACHE_F32:
      return whole ? functions_of<AQ_CACHE_F32, true>() : functions_of<AQ_CACHE_F32, false>();
    case AQ_CACHE_F16:
      return whole ? functions_of<AQ_CACHE_F16, true>() : functions_of<AQ_CACHE_F16, false>();
    case AQ_CACHE_BF16:
      return whole ? functions_of<AQ_CACHE_BF16, true>() : functions_of<AQ_CACHE_BF16, false>();
    case AQ_CACHE_FP8:
      return whole ? functions_of<AQ_CACHE_FP8, true>() : functions_of<AQ_CACHE_FP8, false>();
    default:
      return whole ? functions_of<AQ_CACHE_INT8, true>() : functions_of<AQ_CACHE_INT8, false>();
  }
}

}  // namespace AQ_NAMESPACE
