// A layer over many rows: picks the tile for the kind of weight and shares the tiles among the threads.
#pragma once

#include "linear.h"
#include "team.h"

namespace AQ_NAMESPACE {

constexpr int kDotBlocks = 2;  // blocks of 16 outputs in an integer tile
constexpr int kMaxDenseRows = kMaxFloatRows > 4 ? 4 : kMaxFloatRows;

struct Region {  // of the output: rows x blocks of 16 columns
  int64_t first_row, last_row, first_block, last_block;
};

// Row counts of tiles, largest first: 6, 4, 2, 1 or 8, 4, 2, 1.
constexpr int next_rows(int rows) { return rows == 6 ? 4 : rows / 2; }

template <int kBits, int kRows, int kBlocks, bool kRealOffsets>
static void dot_rows(const AqLinear& layer, const Rows& rows, int64_t row, int64_t last, int64_t block,
                     const Output& out, bool fresh) {
  for (; row + kRows <= last; row += kRows, fresh = false) {
    dot_tile<kBits, kRows, kBlocks, kRealOffsets>(layer, rows, row, block, out, fresh);
  }
  if constexpr (kRows > 1) {
    dot_rows<kBits, next_rows(kRows), kBlocks, kRealOffsets>(layer, rows, row, last, block, out, fresh);
  }
}

template <int kBits, bool kRealOffsets>
static void dot_region(const AqLinear& layer, const Rows& rows, const Region& region, const Output& out) {
  int64_t block = region.first_block;
  for (; block + kDotBlocks <= region.last_block; block += kDotBlocks) {
    dot_rows<kBits, kMaxDotRows, kDotBlocks, kRealOffsets>(layer, rows, region.first_row, region.last_row, block, out,
                                                           true);
  }
  for (; block < region.last_block; block++) {
    dot_rows<kBits, kMaxDotRows, 1, kRealOffsets>(layer, rows, region.first_row, region.last_row, block, out, true);
  }
}

template <int kBits, int kRows, Decoding kDecoding>
static void codes_float_rows(const AqLinear& layer, const Rows& rows, int64_t row, int64_t last, int64_t block,
                             const Output& out, bool fresh) {
  for (; row + kRows <= last; row += kRows, fresh = false) {
    codes_float_tile<kBits, kRows, kDecoding>(layer, rows, row, block, out, fresh);
  }
  if constexpr (kRows > 1) {
    codes_float_rows<kBits, next_rows(kRows), kDecoding>(layer, rows, row, last, block, out, fresh);
  }
}

template <int kRows>
static void fp8_rows(const AqLinear& layer, const Rows& rows, int64_t row, int64_t last, int64_t block,
                     const Output& out, bool fresh) {
  for (; row + kRows <= last; row += kRows, fresh = false) {
    fp8_tile<kRows>(layer, rows, row, block, out, fresh);
  }
  if constexpr (kRows > 1) {
    fp8_rows<next_rows(kRows)>(layer, rows, row, last, block, out, fresh);
  }
}

template <int kKind, int kRows>
static void dense_rows(const AqLinear& layer, const Rows& rows, int64_t row, int64_t last, int64_t block,
                       const Output& out, bool fresh) {
  for (; row + kRows <= last; row += kRows, fresh = false) {
    dense_tile<kKind, kRows>(layer, rows, row, block, out, fresh);
  }
  if constexpr (kRows > 1) {
    dense_rows<kKind, next_rows(kRows)>(layer, rows, row, last, block, out, fresh);
  }
}

template <int kBits, Decoding kDecoding>
static void codes_float_region(const AqLinear& layer, const Rows& rows, const Region& region, const Output& out) {
  for (int64_t block = region.first_block; block < region.last_block; block++) {
    codes_float_rows<kBits, kMaxFloatRows, kDecoding>(layer, rows, region.first_row, region.last_row, block, out, true);
  }
}

template <int kBits>
static void codes_region(const AqLinear& layer, const Rows& rows, const Region& region, const Output& out) {
  const bool offsets = layer.offset_kind == AQ_OFFSETS;
  if (layer.integer_dot) {
    return offsets ? dot_region<kBits, true>(layer, rows, region, out)
                   : dot_region<kBits, false>(layer, rows, region, out);
  }
  if (layer.table != nullptr) return codes_float_region<kBits, kTable>(layer, rows, region, out);
  if (offsets) return codes_float_region<kBits, kOffsets>(layer, rows, region, out);
  return codes_float_region<kBits, kZeros>(layer, rows, region, out);
}

static void linear_region(const AqLinear& layer, const Rows& rows, const Region& region, const Output& out) {
  if (layer.kind == AQ_CODES) {
    if (layer.bits == 2) return codes_region<2>(layer, rows, region, out);
    if (layer.bits == 4) return codes_region<4>(layer, rows, region, out);
    return codes_region<8>(layer, rows, region, out);
  }
  for (int64_t block = region.first_block; block < region.last_block; block++) {
    const int64_t first = region.first_row, last = region.last_row;
    switch (layer.kind) {
      case AQ_FP8:
        fp8_rows<kMaxFloatRows>(layer, rows, first, last, block, out, true);
        break;
      case AQ_DENSE_F16:
        dense_rows<AQ_DENSE_F16, kMaxDenseRows>(layer, rows, first, last, block, out, true);
        break;
      case AQ_DENSE_BF16:
        dense_rows<AQ_DENSE_BF16, kMaxDenseRows>(layer, rows, first, last, block, out, true);
        break;
      default:
        dense_rows<AQ_DENSE_F32, kMaxDenseRows>(layer, rows, first, last, block, out, true);
    }
  }
}

// This thread's share of out = rows W^T. Many rows on many threads are split as well, else only the outputs are.
static void run_linear(const Team& team, const AqLinear& layer, const Rows& rows, int64_t num_rows, const Output& out) {
  const int64_t pairs = (layer.out_features + 31) / 32, blocks = (layer.out_features + 15) / 16;
  const int64_t wanted = (4 * team.size + pairs - 1) / pairs;
  const int64_t row_parts = max64(1, min64(wanted, num_rows / 48));
  const int64_t last = team.last(pairs * row_parts);
  for (int64_t task = team.first(pairs * row_parts); task < last;) {
    const int64_t part = task / pairs, first_pair = task % pairs;
    const int64_t last_pair = min64(pairs, first_pair + last - task);
    const Region region = {num_rows * part / row_parts, num_rows * (part + 1) / row_parts, first_pair * 2,
                           min64(blocks, last_pair * 2)};
    linear_region(layer, rows, region, out);
    task += last_pair - first_pair;
  }
}

}  // namespace AQ_NAMESPACE
