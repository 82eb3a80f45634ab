// Small codes in 32-bit words, as checkpoints pack them: aphroquant/formats/packing.py says what the layouts are, and is
// the definition of correct.
//
// A row of codes belongs to one output. Files have the words of a row side by side (`rows`), or those of one place in all
// rows (`across`: GPTQ, AWQ); the latter are turned in tiles that fit the first cache. Nothing is checked here: packing
// returns the union of all codes, which tells whether one was too wide.
#pragma once

#include "simd.h"

namespace AQ_NAMESPACE {

typedef uint16_t __attribute__((may_alias, aligned(1))) Loose16;
typedef uint32_t __attribute__((may_alias, aligned(1))) Loose32;
typedef uint64_t __attribute__((may_alias, aligned(1))) Loose64;

template <int kBits>
struct Field {  // eight codes of this width
  static constexpr uint64_t one = (uint64_t{1} << kBits) - 1;
  static constexpr uint64_t two = (uint64_t{1} << 2 * kBits) - 1;
  static constexpr uint64_t four = (uint64_t{1} << 4 * kBits) - 1;
};

// Eight codes laid end to end -> one a byte. The distance between neighbours grows in three steps.
template <int kBits>
static inline uint64_t spread(uint64_t x) {
  using F = Field<kBits>;
  x = (x & F::four) | (x >> 4 * kBits & F::four) << 32;
  x = (x & F::two * 0x0000000100000001u) | (x >> 2 * kBits & F::two * 0x0000000100000001u) << 16;
  return (x & F::one * 0x0001000100010001u) | (x >> kBits & F::one * 0x0001000100010001u) << 8;
}

// Inverse of spread. Codes must fit.
template <int kBits>
static inline uint64_t gather(uint64_t x) {
  using F = Field<kBits>;
  constexpr uint64_t one = F::one * 0x0001000100010001u, two = F::two * 0x0000000100000001u;
  x = (x & one) | (x >> (8 - kBits) & one << kBits);
  x = (x & two) | (x >> (16 - 2 * kBits) & two << 2 * kBits);
  return (x & F::four) | (x >> (32 - 4 * kBits) & F::four << 4 * kBits);
}

static inline uint64_t load_some(const uint8_t* p, int64_t count) {
  uint64_t x = 0;
  memcpy(&x, p, static_cast<size_t>(min64(8, count)));
  return x;
}

static inline int64_t words_of(int64_t count, int bits) { return (count * bits + 31) / 32; }

template <int kBits>
static inline void unpack_row(const uint32_t* words, int64_t count, uint8_t* codes) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(words);
  const int64_t eights = count / 8, num_bytes = words_of(count, kBits) * 4;
  int64_t i = 0;
  if (kBits == 8) {
    memcpy(codes, bytes, static_cast<size_t>(count));
    return;
  } else if (kBits == 4) {
    for (; i < eights * 4; i++) {
      const uint16_t x = bytes[i];
      reinterpret_cast<Loose16*>(codes)[i] = static_cast<uint16_t>((x | x << 4) & 0x0f0f);
    }
    i = eights;
  } else if (kBits == 2) {
    for (; i < eights * 2; i++) {
      uint32_t x = bytes[i];
      x = (x | x << 12) & 0x000f000f;
      reinterpret_cast<Loose32*>(codes)[i] = (x | x << 6) & 0x03030303;
    }
    i = eights;
  } else {
    for (; i < eights && i * kBits + 8 <= num_bytes; i++) {
      reinterpret_cast<Loose64*>(codes)[i] = spread<kBits>(*reinterpret_cast<const Loose64*>(bytes + i * kBits));
    }
  }
  for (; i * 8 < count; i++) {
    const uint64_t eight = spread<kBits == 8 ? 4 : kBits>(load_some(bytes + i * kBits, num_bytes - i * kBits));
    memcpy(codes + i * 8, &eight, static_cast<size_t>(min64(8, count - i * 8)));
  }
}

// Returns the union of the codes.
template <int kBits>
static inline uint64_t pack_row(const uint8_t* codes, int64_t count, uint32_t* words) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(words);
  const int64_t eights = count / 8, num_bytes = words_of(count, kBits) * 4;
  uint64_t seen = 0;
  int64_t i = 0;
  if (kBits == 8) {
    memset(bytes + num_bytes / 4 * 4 - 4 * (num_bytes > 0), 0, num_bytes > 0 ? 4 : 0);
    memcpy(bytes, codes, static_cast<size_t>(count));
    return 0;
  } else if (kBits == 4) {
    uint16_t all = 0;
    for (; i < eights * 4; i++) {
      const uint16_t x = reinterpret_cast<const Loose16*>(codes)[i];
      all |= x;
      bytes[i] = static_cast<uint8_t>(x | x >> 4);
    }
    seen = all;
    i = eights;
  } else if (kBits == 2) {
    uint32_t all = 0;
    for (; i < eights * 2; i++) {
      uint32_t x = reinterpret_cast<const Loose32*>(codes)[i];
      all |= x;
      x = (x | x >> 6) & 0x000f000f;
      bytes[i] = static_cast<uint8_t>(x | x >> 12);
    }
    seen = all;
    i = eights;
  } else {
    for (; i < eights && i * kBits + 8 <= num_bytes; i++) {  // what is too much is written over by the next eight
      const uint64_t eight = reinterpret_cast<const Loose64*>(codes)[i];
      seen |= eight;
      *reinterpret_cast<Loose64*>(bytes + i * kBits) = gather<kBits>(eight);
    }
  }
  for (; i * kBits < num_bytes; i++) {
    const uint64_t eight = i * 8 < count ? load_some(codes + i * 8, count - i * 8) : 0;
    seen |= eight;
    const uint64_t packed = gather<kBits == 8 ? 4 : kBits>(eight);
    memcpy(bytes + i * kBits, &packed, static_cast<size_t>(min64(kBits, num_bytes - i * kBits)));
  }
  return seen;
}

static inline int32_t any_byte(uint64_t seen) {
  seen |= seen >> 32;
  seen |= seen >> 16;
  return static_cast<int32_t>((seen | seen >> 8) & 255);
}

#define AQ_FOR_BITS(call) \
  switch (bits) {         \
    case 1: call(1);      \
    case 2: call(2);      \
    case 3: call(3);      \
    case 4: call(4);      \
    case 5: call(5);      \
    case 6: call(6);      \
    case 7: call(7);      \
    default: call(8);     \
  }

template <int kBits>
static void unpack_rows(const uint32_t* words, int64_t stride, int64_t rows, int64_t count, uint8_t* codes) {
  for (int64_t n = 0; n < rows; n++) unpack_row<kBits>(words + n * stride, count, codes + n * count);
}

template <int kBits>
static int32_t pack_rows(const uint8_t* codes, int64_t rows, int64_t count, uint32_t* words) {
  const int64_t num_words = words_of(count, kBits);
  uint64_t seen = 0;
  for (int64_t n = 0; n < rows; n++) seen |= pack_row<kBits>(codes + n * count, count, words + n * num_words);
  return any_byte(seen);
}

// to[c][r] = from[r][c] of any number of words.
static inline void transpose_words(const uint32_t* from, int64_t from_stride, int64_t rows, int64_t columns,
                                   uint32_t* to, int64_t to_stride) {
  const int64_t whole_rows = rows / kBlock * kBlock, whole_columns = columns / kBlock * kBlock;
  for (int64_t r = 0; r < whole_rows; r += kBlock) {
    for (int64_t c = 0; c < whole_columns; c += kBlock) {
      transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; c++) {
      to[c * to_stride + r] = from[r * from_stride + c];
    }
  }
}

constexpr int64_t kTile = 64;  // rows, and words of a row, of a tile

// Words of a tile, at most kTile, after which a code begins with a word.
constexpr int64_t tile_words(int bits) {
  return bits == 3 || bits == 6 ? 63 : bits == 5 ? 60 : bits == 7 ? 63 : kTile;
}

template <int kBits>
static void unpack_across(const uint32_t* words, int64_t rows, int64_t count, uint8_t* codes) {
  alignas(64) uint32_t tile[kTile][kTile];
  const int64_t num_words = words_of(count, kBits), step = tile_words(kBits);
  for (int64_t w0 = 0; w0 < num_words; w0 += step) {
    const int64_t wide = min64(step, num_words - w0), first = w0 * 32 / kBits;
    const int64_t part = min64(wide * 32 / kBits, count - first);
    for (int64_t n0 = 0; n0 < rows; n0 += kTile) {
      const int64_t high = min64(kTile, rows - n0);
      transpose_words(words + w0 * rows + n0, rows, wide, high, tile[0], kTile);
      for (int64_t n = 0; n < high; n++) unpack_row<kBits>(tile[n], part, codes + (n0 + n) * count + first);
    }
  }
}

template <int kBits>
static int32_t pack_across(const uint8_t* codes, int64_t rows, int64_t count, uint32_t* words) {
  alignas(64) uint32_t tile[kTile][kTile];
  const int64_t num_words = words_of(count, kBits), step = tile_words(kBits);
  uint64_t seen = 0;
  for (int64_t w0 = 0; w0 < num_words; w0 += step) {
    const int64_t wide = min64(step, num_words - w0), first = w0 * 32 / kBits;
    const int64_t part = min64(wide * 32 / kBits, count - first);
    for (int64_t n0 = 0; n0 < rows; n0 += kTile) {
      const int64_t high = min64(kTile, rows - n0);
      for (int64_t n = 0; n < high; n++) seen |= pack_row<kBits>(codes + (n0 + n) * count + first, part, tile[n]);
      transpose_words(tile[0], kTile, high, wide, words + w0 * rows + n0, rows);
    }
  }
  return any_byte(seen);
}

static void unpack_codes(const uint32_t* words, int64_t stride, int64_t rows, int64_t count, int32_t bits,
                         uint8_t* codes) {
#define AQ_CALL(b) return unpack_rows<b>(words, stride, rows, count, codes)
  AQ_FOR_BITS(AQ_CALL)
#undef AQ_CALL
}

static int32_t pack_codes(const uint8_t* codes, int64_t rows, int64_t count, int32_t bits, uint32_t* words) {
#define AQ_CALL(b) return pack_rows<b>(codes, rows, count, words)
  AQ_FOR_BITS(AQ_CALL)
#undef AQ_CALL
}

static void unpack_codes_across(const uint32_t* words, int64_t rows, int64_t count, int32_t bits, uint8_t* codes) {
#define AQ_CALL(b) return unpack_across<b>(words, rows, count, codes)
  AQ_FOR_BITS(AQ_CALL)
#undef AQ_CALL
}

static int32_t pack_codes_across(const uint8_t* codes, int64_t rows, int64_t count, int32_t bits, uint32_t* words) {
#define AQ_CALL(b) return pack_across<b>(codes, rows, count, words)
  AQ_FOR_BITS(AQ_CALL)
#undef AQ_CALL
}

// AWQ: the eight nibbles of a word are of eight rows, in this order.
constexpr int kAwqRow[8] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr int64_t kAwqWords = 16, kAwqColumns = 1024;  // of a tile

static inline void split_byte(const uint32_t* __restrict words, int shift, int64_t count, uint8_t* __restrict low,
                              uint8_t* __restrict high) {
  for (int64_t k = 0; k < count; k++) {
    const uint8_t byte = static_cast<uint8_t>(words[k] >> shift);
    low[k] = byte & 15;
    high[k] = static_cast<uint8_t>(byte >> 4);
  }
}

// Returns the union of the codes.
static inline uint32_t join_byte(const uint8_t* __restrict low, const uint8_t* __restrict high, int64_t count,
                                 uint8_t* __restrict bytes) {
  uint8_t seen = 0;
  for (int64_t k = 0; k < count; k++) {
    seen |= low[k] | high[k];
    bytes[k] = static_cast<uint8_t>(low[k] | high[k] << 4);
  }
  return seen;
}

static inline void join_words(const uint8_t (*__restrict bytes)[kAwqColumns], int64_t count, uint32_t* __restrict words) {
  for (int64_t k = 0; k < count; k++) {
    const uint32_t low = static_cast<uint16_t>(bytes[0][k] | bytes[1][k] << 8);
    words[k] = low | static_cast<uint32_t>(static_cast<uint16_t>(bytes[2][k] | bytes[3][k] << 8)) << 16;
  }
}

static void unpack_awq(const uint32_t* words, int64_t rows, int64_t count, uint8_t* codes) {
  alignas(64) uint32_t tile[kAwqWords][kAwqColumns];
  const int64_t num_words = rows / 8;
  for (int64_t k0 = 0; k0 < count; k0 += kAwqColumns) {
    const int64_t wide = min64(kAwqColumns, count - k0);
    for (int64_t m0 = 0; m0 < num_words; m0 += kAwqWords) {
      const int64_t high = min64(kAwqWords, num_words - m0);
      transpose_words(words + k0 * num_words + m0, num_words, wide, high, tile[0], kAwqColumns);
      for (int64_t m = 0; m < high; m++) {
        uint8_t* to = codes + (m0 + m) * 8 * count + k0;
        for (int byte = 0; byte < 4; byte++) {
          split_byte(tile[m], 8 * byte, wide, to + kAwqRow[2 * byte] * count, to + kAwqRow[2 * byte + 1] * count);
        }
      }
    }
  }
}

static int32_t pack_awq(const uint8_t* codes, int64_t rows, int64_t count, uint32_t* words) {
  alignas(64) uint32_t tile[kAwqWords][kAwqColumns];
  alignas(64) uint8_t bytes[4][kAwqColumns];
  const int64_t num_words = rows / 8;
  uint32_t seen = 0;
  for (int64_t k0 = 0; k0 < count; k0 += kAwqColumns) {
    const int64_t wide = min64(kAwqColumns, count - k0);
    for (int64_t m0 = 0; m0 < num_words; m0 += kAwqWords) {
      const int64_t high = min64(kAwqWords, num_words - m0);
      for (int64_t m = 0; m < high; m++) {
        const uint8_t* from = codes + (m0 + m) * 8 * count + k0;
        for (int byte = 0; byte < 4; byte++) {
          seen |= join_byte(from + kAwqRow[2 * byte] * count, from + kAwqRow[2 * byte + 1] * count, wide, bytes[byte]);
        }
        join_words(bytes, wide, tile[m]);
      }
      transpose_words(tile[0], kAwqColumns, high, wide, words + k0 * num_words + m0, num_words);
    }
  }
  return static_cast<int32_t>(seen);
}

template <typename Number>
static uint32_t largest_of(const void* numbers, int64_t count, Number mask) {
  const Number* x = static_cast<const Number*>(numbers);
  Number top = 0;
  for (int64_t i = 0; i < count; i++) {
    const Number field = static_cast<Number>(x[i] & mask);
    top = field > top ? field : top;
  }
  return top;
}

// The largest of x & mask over unsigned numbers of `width` bytes: whether codes fit, whether floats are finite.
static uint32_t largest_masked(const void* numbers, int64_t count, int32_t width, uint32_t mask) {
  if (width == 1) return largest_of<uint8_t>(numbers, count, static_cast<uint8_t>(mask));
  if (width == 2) return largest_of<uint16_t>(numbers, count, static_cast<uint16_t>(mask));
  return largest_of<uint32_t>(numbers, count, mask);
}

}  // namespace AQ_NAMESPACE
