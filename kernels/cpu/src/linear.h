// y = x W^T for every kind of weight.
//
// An output element is summed in one fixed order whatever else is in the call: chunks of columns in ascending order,
// each an exact integer dot product or a float chain, added to one float32 total. Tiles of more rows or outputs only
// share loads; they never change that order. So a row's result is the same bits in a batch of any size, on any number
// of threads.
//
// W = (codes - zeros) * scales: with the row's codes c, scale s and sum of codes t, a chunk adds
//     (dot(codes, c) - zeros * t) * (scales * s)
// where the first factor is an integer below 2**24, exact in float32. With real offsets it is
// dot(codes, c) * (scales * s) + offsets * (t * s).
#pragma once

#include "rows.h"

namespace AQ_NAMESPACE {

struct Output {
  float* y;
  int64_t stride;
  bool accumulate;  // y += instead of y =
};

static inline void write_block(const AqLinear& layer, const Output& out, int64_t row, int64_t block, F32 total) {
  const int64_t n = block * 16, lanes = min64(16, layer.out_features - n);
  float* y = out.y + row * out.stride + n;
  if (layer.bias != nullptr) total = add(total, load(layer.bias + n));
  if (lanes == 16) {
    store(y, out.accumulate ? add(load(y), total) : total);
  } else {
    store_first(y, out.accumulate ? add(load_first(y, lanes), total) : total, lanes);
  }
}

// Scales and zero points are streams of their own, a sixteenth and less of the codes: asked for as much earlier.
static inline void prefetch_group(const AqLinear& layer, int64_t index) {
  const int64_t scale_bytes = layer.scale_type == AQ_F32 ? 4 : 2;
  const int64_t offset_bytes = layer.offset_kind == AQ_ZEROS_U8 ? 1 : scale_bytes;
  prefetch(layer.scales, index * scale_bytes + kPrefetchBytes / 16);
  prefetch(layer.offsets, index * offset_bytes + kPrefetchBytes / 32);
}

static inline F32 load_offset(const AqLinear& layer, int64_t index) {
  if (layer.offset_kind == AQ_ZEROS_U8) return load_u8(static_cast<const uint8_t*>(layer.offsets) + index);
  return load_scale(layer.offsets, layer.scale_type, index);
}

template <int kBits>
static inline const uint8_t* lines_of(const AqLinear& layer, int64_t block, int64_t chunk) {
  constexpr int64_t kColumns = 32 / kBits;  // columns of a line
  const int64_t lines = block * (layer.padded_in / kColumns) + chunk * (layer.chunk_len / kColumns);
  return static_cast<const uint8_t*>(layer.codes) + lines * 64;
}

// Codes times int8 rows. kRows x kBlocks register tile. `fresh`: the weights have not been read yet for other rows.
template <int kBits, int kRows, int kBlocks, bool kRealOffsets>
static void dot_tile(const AqLinear& layer, const Rows& rows, int64_t row, int64_t block, const Output& out,
                     bool fresh) {
  constexpr int kSteps = 8 / kBits;
  const int64_t num_lines = layer.chunk_len / (4 * kSteps);
  F32 total[kRows][kBlocks];
  AQ_UNROLL
  for (int r = 0; r < kRows; r++) {
    AQ_UNROLL
    for (int b = 0; b < kBlocks; b++) total[r][b] = zero();
  }
  for (int64_t chunk = 0; chunk < layer.num_chunks; chunk++) {
    const uint8_t* lines[kBlocks];
    AQ_UNROLL
    for (int b = 0; b < kBlocks; b++) lines[b] = lines_of<kBits>(layer, block + b, chunk);
    const int8_t* codes = rows.codes + row * rows.stride + chunk * layer.chunk_len;
    I32 dots[kRows][kBlocks];
    AQ_UNROLL
    for (int r = 0; r < kRows; r++) {
      AQ_UNROLL
      for (int b = 0; b < kBlocks; b++) dots[r][b] = zero_int();
    }
    for (int64_t line = 0; line < num_lines; line++) {
      Bytes packed[kBlocks];
      AQ_UNROLL
      for (int b = 0; b < kBlocks; b++) {
        packed[b] = load_bytes(lines[b] + line * 64);
        if (fresh) prefetch(lines[b] + line * 64, kPrefetchBytes);
      }
      AQ_UNROLL
      for (int step = 0; step < kSteps; step++) {
        Bytes weights[kBlocks];
        AQ_UNROLL
        for (int b = 0; b < kBlocks; b++) weights[b] = unpack<kBits>(packed[b], step);
        const int8_t* four = codes + (line * kSteps + step) * 4;
        AQ_UNROLL
        for (int r = 0; r < kRows; r++) {
          AQ_UNROLL
          for (int b = 0; b < kBlocks; b++) dots[r][b] = dot4<kBits>(dots[r][b], weights[b], four + r * rows.stride);
        }
      }
    }
    AQ_UNROLL
    for (int b = 0; b < kBlocks; b++) {
      const int64_t group = ((block + b) * layer.num_groups + layer.chunk_groups[chunk]) * 16;
      if (fresh) prefetch_group(layer, group);
      const F32 scales = load_scale(layer.scales, layer.scale_type, group);
      const F32 offsets = load_offset(layer, group);
      AQ_UNROLL
      for (int r = 0; r < kRows; r++) {
        const int64_t index = (row + r) * rows.num_chunks + chunk;
        const F32 combined = mul(scales, broadcast(rows.scales[index]));
        const F32 dot = to_float(dots[r][b]);
        if constexpr (kRealOffsets) {
          total[r][b] = fma(dot, combined, total[r][b]);
          total[r][b] = fma(offsets, broadcast(rows.sums[index] * rows.scales[index]), total[r][b]);
        } else {
          total[r][b] = fma(fma(offsets, broadcast(-rows.sums[index]), dot), combined, total[r][b]);
        }
      }
    }
  }
  AQ_UNROLL
  for (int r = 0; r < kRows; r++) {
    AQ_UNROLL
    for (int b = 0; b < kBlocks; b++) write_block(layer, out, row + r, block + b, total[r][b]);
  }
}

// What a code is turned into before the scales.
enum Decoding { kZeros, kOffsets, kTable };

// Codes times float rows: the weights become float32 in registers.
template <int kBits, int kRows, Decoding kDecoding>
static void codes_float_tile(const AqLinear& layer, const Rows& rows, int64_t row, int64_t block, const Output& out,
                             bool fresh) {
  constexpr int kSteps = 8 / kBits;
  const int64_t num_lines = layer.chunk_len / (4 * kSteps);
  F32 total[kRows];
  AQ_UNROLL
  for (int r = 0; r < kRows; r++) total[r] = zero();
  for (int64_t chunk = 0; chunk < layer.num_chunks; chunk++) {
    const uint8_t* lines = lines_of<kBits>(layer, block, chunk);
    const float* x = rows.values + row * rows.stride + chunk * layer.chunk_len;
    const int64_t group = (block * layer.num_groups + layer.chunk_groups[chunk]) * 16;
    const F32 scales = load_scale(layer.scales, layer.scale_type, group);
    const F32 offsets = load_offset(layer, group);
    F32 part[kRows];
    AQ_UNROLL
    for (int r = 0; r < kRows; r++) part[r] = zero();
    for (int64_t line = 0; line < num_lines; line++) {
      const Bytes packed = load_bytes(lines + line * 64);
      if (fresh) prefetch(lines + line * 64, kPrefetchBytes);
      AQ_UNROLL
      for (int step = 0; step < kSteps; step++) {
        AQ_UNROLL
        for (int column = 0; column < 4; column++) {
          F32 weight = unpack_column<kBits>(packed, step, column);
          if constexpr (kDecoding == kZeros) weight = sub(weight, offsets);
          if constexpr (kDecoding == kOffsets) weight = fma(weight, scales, offsets);
          if constexpr (kDecoding == kTable) weight = look_up(layer.table, weight);
          const float* value = x + (line * kSteps + step) * 4 + column;
          AQ_UNROLL
          for (int r = 0; r < kRows; r++) part[r] = fma(weight, broadcast(value[r * rows.stride]), part[r]);
        }
      }
    }
    AQ_UNROLL
    for (int r = 0; r < kRows; r++) {
      total[r] = kDecoding == kOffsets ? add(total[r], part[r]) : fma(part[r], scales, total[r]);
    }
  }
  AQ_UNROLL
  for (int r = 0; r < kRows; r++) write_block(layer, out, row + r, block, total[r]);
}

template <int kRows>
static void fp8_tile(const AqLinear& layer, const Rows& rows, int64_t row, int64_t block, const Output& out,
                     bool fresh) {
  const uint8_t* codes = static_cast<const uint8_t*>(layer.codes) + block * layer.padded_in * 16;
  F32 total[kRows];
  AQ_UNROLL
  for (int r = 0; r < kRows; r++) total[r] = zero();
  for (int64_t chunk = 0; chunk < layer.num_chunks; chunk++) {
    const int64_t first = chunk * layer.chunk_len, last = min64(first + layer.chunk_len, layer.padded_in);
    const int64_t group = (block * layer.num_groups + layer.chunk_groups[chunk]) * 16;
    const F32 scales = load_scale(layer.scales, layer.scale_type, group);
    F32 part[kRows];
    AQ_UNROLL
    for (int r = 0; r < kRows; r++) part[r] = zero();
    for (int64_t k = first; k < last; k++) {
      const F32 weight = load_fp8(codes + k * 16);
      if (fresh && k % 4 == 0) prefetch(codes + k * 16, kPrefetchBytes);
      AQ_UNROLL
      for (int r = 0; r < kRows; r++) {
        part[r] = fma(weight, broadcast(rows.values[(row + r) * rows.stride + k]), part[r]);
      }
    }
    AQ_UNROLL
    for (int r = 0; r < kRows; r++) total[r] = fma(part[r], scales, total[r]);
  }
  AQ_UNROLL
  for (int r = 0; r < kRows; r++) write_block(layer, out, row + r, block, total[r]);
}

constexpr int64_t dense_bytes(int kind) { return kind == AQ_DENSE_F32 ? 4 : 2; }

template <int kKind>
static inline F32 load_dense(const void* weight, int64_t index) {
  if constexpr (kKind == AQ_DENSE_F16) return load_f16(static_cast<const uint16_t*>(weight) + index);
  if constexpr (kKind == AQ_DENSE_BF16) return load_bf16(static_cast<const uint16_t*>(weight) + index);
  return load(static_cast<const float*>(weight) + index);
}

// The last, partial 16 columns of a row; nothing beyond the row is read.
template <int kKind>
static inline F32 load_dense_first(const void* weight, int64_t index, int64_t count) {
  if constexpr (kKind == AQ_DENSE_F32) {
    return load_first(static_cast<const float*>(weight) + index, count);
  } else {
    uint16_t lanes[16] = {};
    memcpy(lanes, static_cast<const uint16_t*>(weight) + index, static_cast<size_t>(count) * 2);
    return load_dense<kKind>(lanes, 0);
  }
}

// 16 rows of a dense weight [N][K] with kRows input rows; lanes run along the columns.
template <int kKind, int kRows>
static void dense_tile(const AqLinear& layer, const Rows& rows, int64_t row, int64_t block, const Output& out,
                       bool fresh) {
  constexpr int kOutputs = 4;
  const int64_t k = layer.in_features, n = block * 16, whole = k / 16 * 16;
  F32 sums[kRows][16];
  for (int64_t first = 0; first < 16; first += kOutputs) {
    F32 total[kRows][kOutputs];
    int64_t start[kOutputs];
    AQ_UNROLL
    for (int o = 0; o < kOutputs; o++) {
      start[o] = min64(n + first + o, layer.out_features - 1) * k;
      AQ_UNROLL
      for (int r = 0; r < kRows; r++) total[r][o] = zero();
    }
    for (int64_t i = 0; i < whole; i += 16) {
      F32 x[kRows];
      AQ_UNROLL
      for (int r = 0; r < kRows; r++) x[r] = load(rows.values + (row + r) * rows.stride + i);
      AQ_UNROLL
      for (int o = 0; o < kOutputs; o++) {
        const F32 weight = load_dense<kKind>(layer.codes, start[o] + i);
        if (fresh && i % 32 == 0) {
          prefetch(layer.codes, (start[o] + i) * dense_bytes(kKind) + kPrefetchBytes);
          if (kKind == AQ_DENSE_F32) prefetch(layer.codes, (start[o] + i) * dense_bytes(kKind) + kPrefetchBytes + 64);
        }
        AQ_UNROLL
        for (int r = 0; r < kRows; r++) total[r][o] = fma(weight, x[r], total[r][o]);
      }
    }
    AQ_UNROLL
    for (int r = 0; r < kRows && whole < k; r++) {
      const F32 x = load_first(rows.values + (row + r) * rows.stride + whole, k - whole);
      AQ_UNROLL
      for (int o = 0; o < kOutputs; o++) {
        total[r][o] = fma(load_dense_first<kKind>(layer.codes, start[o] + whole, k - whole), x, total[r][o]);
      }
    }
    AQ_UNROLL
    for (int r = 0; r < kRows; r++) {
      AQ_UNROLL
      for (int o = 0; o < kOutputs; o++) sums[r][first + o] = total[r][o];
    }
  }
  AQ_UNROLL
  for (int r = 0; r < kRows; r++) write_block(layer, out, row + r, block, sum_each(sums[r]));
}

}  // namespace AQ_NAMESPACE
