// ldmatrix by 32-bit addresses: rows gathered from anywhere in shared memory.
#pragma once

#include "types.cuh"

// Four 8 x 8 matrices of 16-bit items; lane l gives the address of row l % 8 of matrix l / 8. Lane l receives of each
// matrix the pair (row l / 4, columns 2 (l % 4) + {0, 1}). Not volatile: the compiler interleaves independent ones.
__device__ __forceinline__ void gather_matrices(uint32_t (&d)[4], uint32_t address) {
    asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(address)
        : "memory");
}
