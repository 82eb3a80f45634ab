// Emulated: copies arrive at once. A tensor map holds the address, the sizes, the bytes between neighbours of all but the
// innermost dimension, the box, and the bytes of an item; dimensions from the outermost inwards.
#pragma once

#include "ptx/barrier.cuh"

struct alignas(64) TensorMap {
  uint64_t words[16];
};
constexpr uint64_t kCacheEvictFirst = 0, kCacheEvictLast = 0, kCacheEvictNormal = 0;

inline void bulk_load(unsigned shared, const void* global, unsigned bytes, unsigned barrier, uint64_t) {
  if (shared % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16) {
    std::fprintf(stderr, "a bulk copy is not aligned\n");
    std::abort();
  }
  std::memcpy(shared_base() + shared, global, bytes);
  mbarrier_complete(barrier, bytes);
}

// Rows of 128 bytes, swizzled by the address.
inline void tensor_load(unsigned shared, const TensorMap* map, int x, int y, unsigned barrier, uint64_t) {
  const int64_t rows = map->words[1], columns = map->words[2], stride = map->words[3], size = map->words[6];
  const int box_rows = int(map->words[4]), box_columns = int(map->words[5]);
  const auto* source = reinterpret_cast<const unsigned char*>(map->words[0]);
  for (int row = 0; row < box_rows; ++row)
    for (int column = 0; column < box_columns; ++column) {
      unsigned address = shared + unsigned(row * box_columns * size + column * size);
      address ^= (address >> 7 & 7) << 4;
      const bool inside = y + row < rows && x + column < columns;
      for (int i = 0; i < size; ++i)
        shared_base()[address + i] = inside ? source[(y + row) * stride + (x + column) * size + i] : 0;
    }
  mbarrier_complete(barrier, unsigned(box_rows * box_columns * size));
}

inline void tensor_load(unsigned shared, const TensorMap* map, int x, int y, int z, int w, unsigned barrier, uint64_t) {
  const uint64_t *sizes = map->words + 1, *strides = map->words + 5, *box = map->words + 8;
  const uint64_t first[4] = {uint64_t(w), uint64_t(z), uint64_t(y), uint64_t(x)}, item = map->words[12];
  const uint64_t count = box[0] * box[1] * box[2] * box[3];
  for (uint64_t index = 0; index < count; ++index) {
    uint64_t rest = index, place = map->words[0];
    bool inside = true;
    for (int dimension = 3; dimension >= 0; --dimension) {
      const uint64_t own = first[dimension] + rest % box[dimension];
      rest /= box[dimension];
      inside &= own < sizes[dimension];
      place += own * (dimension == 3 ? item : strides[dimension]);
    }
    unsigned address = shared + unsigned(index * item);
    address ^= (address >> 7 & 7) << 4;
    for (uint64_t i = 0; i < item; ++i)
      shared_base()[address + i] = inside ? reinterpret_cast<const unsigned char*>(place)[i] : 0;
  }
  mbarrier_complete(barrier, unsigned(count * item));
}
inline void tensor_load_multicast(unsigned shared, const TensorMap* map, int x, int y, unsigned barrier, uint16_t,
                                  uint64_t cache) {
  tensor_load(shared, map, x, y, barrier, cache);
}
