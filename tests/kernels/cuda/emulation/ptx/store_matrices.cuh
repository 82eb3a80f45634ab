// Emulated: stmatrix, transposed.
#pragma once

inline void store_matrices_transposed(unsigned address, const unsigned (&pairs)[4]) {
  const auto addresses = exchange(address);
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int half = 0; half < 2; ++half) {
      const int row = lane_id() / 4, column = lane_id() % 4 * 2 + half;
      const unsigned short item = static_cast<unsigned short>(pairs[matrix] >> 16 * half);
      std::memcpy(shared_base() + addresses[matrix * 8 + column] + row * 2, &item, 2);
    }
  __syncwarp();
}
