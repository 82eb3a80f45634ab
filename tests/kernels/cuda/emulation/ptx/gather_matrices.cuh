// Emulated: rows of matrices gathered from shared memory.
#pragma once

#include "ptx/barrier.cuh"
#include "ptx/warp_matrix.cuh"

inline void gather_matrices(uint32_t (&d)[4], uint32_t address) {
  load_matrices<false>(d, shared_base() + address);
}
