// Emulated: wgmma with spaced groups of rows, and with a B whose rows are the steps of the sum.
#pragma once

#include "ptx/wgmma.cuh"

inline uint64_t wgmma_descriptor_spaced(unsigned address, unsigned stride) {
  return address >> 4 | uint64_t(stride >> 4) << 32;
}
inline uint64_t wgmma_descriptor_transposed(unsigned address, unsigned row_stride, unsigned column_stride) {
  return address >> 4 | uint64_t(column_stride >> 4) << 16 | uint64_t(row_stride >> 4) << 32;
}

template <bool IS_BF16, int COUNT>
inline void wgmma_transposed(float (&d)[COUNT], const unsigned (&a)[4], uint64_t b) {
  wgmma_registers<IS_BF16>(d, a, 1, [&](int n, int k) {
    const uint64_t columns = b + (n / 64 * descriptor_field(b, 16) >> 4);
    unsigned short bits;
    std::memcpy(&bits, shared_base() + swizzled(columns, k, n % 64 * 2), 2);
    return operand<IS_BF16>(bits, 0);
  });
}
template <int COUNT>
inline void wgmma_bf16_transposed(float (&d)[COUNT], const unsigned (&a)[4], uint64_t b) {
  wgmma_transposed<true>(d, a, b);
}
template <int COUNT>
inline void wgmma_f16_transposed(float (&d)[COUNT], const unsigned (&a)[4], uint64_t b) {
  wgmma_transposed<false>(d, a, b);
}
