// Emulated: wgmma, done at once, with the layouts of the PTX manual.
#pragma once

#include "ptx/warp_matrix.cuh"

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int pending>
inline void wgmma_wait() {}
template <typename T>
inline void wgmma_pin(T&) {}
template <int registers>
inline void warpgroup_take_registers() {}
template <int registers>
inline void warpgroup_give_registers() {}
inline uint64_t wgmma_descriptor(unsigned address) { return address >> 4 | uint64_t(1024 >> 4) << 32; }

// A field of 14 bits, in units of 16 bytes.
inline unsigned descriptor_field(uint64_t descriptor, int first_bit) {
  return unsigned(descriptor >> first_bit & 0x3fff) << 4;
}
inline unsigned swizzled(uint64_t descriptor, int row, int byte) {
  const unsigned group = row / 8 * descriptor_field(descriptor, 32);
  const unsigned address = descriptor_field(descriptor, 0) + group + row % 8 * 128 + byte;
  return address ^ (address >> 7 & 7) << 4;
}
template <bool IS_BF16>
inline float shared_number(uint64_t descriptor, int row, int k) {
  unsigned short bits;
  std::memcpy(&bits, shared_base() + swizzled(descriptor, row, k * 2), 2);
  return operand<IS_BF16>(bits, 0);
}
inline float shared_float8(uint64_t descriptor, int row, int k) {
  __nv_fp8_e4m3 code;
  code.__x = shared_base()[swizzled(descriptor, row, k)];
  return float(code);
}

template <int COUNT, int DEPTH, typename Left, typename Right>
inline void accumulate_products(float (&d)[COUNT], int accumulate, const Left& left, const Right& right) {
  const int row = lane_id() / 4, column = lane_id() % 4 * 2;
  for (int i = 0; i < COUNT; ++i) {
    double sum = 0;
    for (int k = 0; k < DEPTH; ++k) sum += double(left(row + i / 2 % 2 * 8, k)) * right(column + i / 4 * 8 + i % 2, k);
    d[i] = (accumulate ? d[i] : 0.0f) + float(sum);
  }
}

struct FragmentA {
  unsigned words[4];
};
template <bool IS_BF16, int COUNT, typename Right>
inline void wgmma_registers(float (&d)[COUNT], const unsigned (&a)[4], int accumulate, const Right& right) {
  const auto all = exchange(FragmentA{{a[0], a[1], a[2], a[3]}});
  const auto left = [&](int row, int k) {
    const unsigned word = all[row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2];
    return operand<IS_BF16>(word, k % 2);
  };
  accumulate_products<COUNT, 16>(d, accumulate, left, right);
}
template <int COUNT>
inline void wgmma_bf16(float (&d)[COUNT], const unsigned (&a)[4], uint64_t b, int accumulate) {
  wgmma_registers<true>(d, a, accumulate, [&](int n, int k) { return shared_number<true>(b, n, k); });
}
template <int COUNT>
inline void wgmma_f16(float (&d)[COUNT], const unsigned (&a)[4], uint64_t b, int accumulate) {
  wgmma_registers<false>(d, a, accumulate, [&](int n, int k) { return shared_number<false>(b, n, k); });
}
template <bool IS_BF16, int COUNT>
inline void wgmma_shared(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {
  const int warp_row = int(block.current % 128 / 32) * 16;
  accumulate_products<COUNT, 16>(
      d, accumulate, [&](int row, int k) { return shared_number<IS_BF16>(a, warp_row + row, k); },
      [&](int n, int k) { return shared_number<IS_BF16>(b, n, k); });
}
template <int COUNT>
inline void wgmma_bf16(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {
  wgmma_shared<true>(d, a, b, accumulate);
}
template <int COUNT>
inline void wgmma_f16(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {
  wgmma_shared<false>(d, a, b, accumulate);
}
template <int COUNT>
inline void wgmma_e4m3(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {
  const int warp_row = int(block.current % 128 / 32) * 16;
  accumulate_products<COUNT, 32>(
      d, accumulate, [&](int row, int k) { return shared_float8(a, warp_row + row, k); },
      [&](int n, int k) { return shared_float8(b, n, k); });
}
