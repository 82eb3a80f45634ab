// stmatrix (sm_90): fragments of 8 x 8 matrices of 16-bit items to shared memory.
#pragma once

#include "types.cuh"

// Lane l holds of each of four matrices the pair (row l / 4, columns 2 (l % 4) + {0, 1}); each matrix is stored
// transposed, and lane l gives the address for column l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&pairs)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                 : "memory");
}
