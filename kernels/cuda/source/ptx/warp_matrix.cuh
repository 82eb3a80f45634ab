// Products of small matrices by a warp: mma.sync m16n8k16 with float32 accumulators, and ldmatrix.
//
// Lane l, with g = l / 4 and t = l % 4, holds of A [16 x 16] the pairs (row g, columns 2t, 2t+1), (g+8, same),
// (g, 2t+8, 2t+9), (g+8, same); of B [16 x 8] the pairs (rows 2t, 2t+1, column g), (2t+8, 2t+9, g); of C and D [16 x 8]
// the numbers (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
#pragma once

// d += a b with bf16 (IS_BF16) or fp16 operands. Not volatile: the compiler interleaves independent products.
template <bool IS_BF16>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if (IS_BF16) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8 x 8 matrices of 16-bit items; lane l gives the address of row l % 8 of matrix l / 8. Lane l receives of each
// matrix the pair (row g, columns 2t, 2t+1), or with TRANSPOSED (rows 2t, 2t+1, column g).
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&d)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
  }
}
