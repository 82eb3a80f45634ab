// Emulated: products of small matrices by a warp, with the fragment layouts of the PTX manual.
#pragma once

template <bool IS_BF16>
inline float operand(unsigned word, int half) {
  const unsigned short bits = static_cast<unsigned short>(word >> 16 * half);
  if (IS_BF16) return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
  return __half2float(__half(__half_raw{bits}));
}

struct MultiplyOperands {
  unsigned a[4], b[2];
};

template <bool IS_BF16>
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const auto all = exchange(MultiplyOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, place = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        left[group + i % 2 * 8][place + half + i / 2 * 8] = operand<IS_BF16>(all[lane].a[i], half);
      for (int i = 0; i < 2; ++i) right[place + half + i * 8][group] = operand<IS_BF16>(all[lane].b[i], half);
    }
  }
  const int group = lane_id() / 4, place = lane_id() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    double sum = 0;
    for (int k = 0; k < 16; ++k) sum += double(left[group + i / 2 * 8][k]) * right[k][place + i % 2];
    d[i] += float(sum);
  }
}

template <bool TRANSPOSED>
inline void load_matrices(unsigned (&d)[4], const void* row) {
  const auto rows = exchange(row);
  const int group = lane_id() / 4, place = lane_id() % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned short pair[2];
    for (int half = 0; half < 2; ++half) {
      const int source = TRANSPOSED ? place + half : group, column = TRANSPOSED ? group : place + half;
      pair[half] = static_cast<const unsigned short*>(rows[matrix * 8 + source])[column];
    }
    d[matrix] = pair[0] | unsigned(pair[1]) << 16;
  }
}
