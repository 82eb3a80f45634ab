// Codebook entries by their codes, from shared memory or L2.
//
// Small codebooks lie in shared memory in COPIES copies side by side, one for each lane of those that shared memory serves
// at once, so that no two lanes meet in a bank. Of a large codebook the first HOT entries lie there, and the rest in L2.
//
// Macros: those of aqlm_elements.cuh, CODE_BITS, IN_GROUP (numbers in an entry), COPIES or HOT.
#pragma once

#include "aqlm_elements.cuh"
#include "ptx/barrier.cuh"
#include "ptx/split_load.cuh"
#include "ptx/stream_load.cuh"

#ifndef CODE_BITS
#define CODE_BITS 8
#endif
#ifndef IN_GROUP
#define IN_GROUP 8
#endif
#ifndef COPIES
#define COPIES 8
#endif
#ifndef HOT
#define HOT 0
#endif

constexpr int kEntries = 1 << CODE_BITS;
constexpr int kChunkBytes = IN_GROUP % 8 == 0 ? 16 : 8;  // of an entry, loaded at once
constexpr int kChunks = IN_GROUP * 2 / kChunkBytes;
constexpr int kGroupSets = SLICE_GROUPS >= 32 ? SLICE_GROUPS / 32 : 1;  // groups of a word
constexpr int kBookBytes = COPIES > 0 ? CODEBOOKS * kEntries * kChunks * COPIES * kChunkBytes : HOT * IN_GROUP * 2;

static_assert(IN_GROUP % 4 == 0, "a matrix instruction takes four numbers of a lane");
static_assert(COPIES == 0 || HOT == 0, "all entries are in shared memory, or some");
static_assert(HOT == 0 || (kChunkBytes == 16 && CODEBOOKS == 1), "of one codebook of whole vectors");

struct Chunk {
    uint32_t words[kChunkBytes / 4];
};

template <int BYTES>
struct VectorOf {
    using Type = uint4;
};
template <>
struct VectorOf<8> {
    using Type = uint2;
};
using Vector = VectorOf<kChunkBytes>::Type;

__device__ __forceinline__ Chunk chunk_of(uint4 v) {
    Chunk chunk;
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < kChunkBytes / 4; ++i) chunk.words[i] = words[i];
    return chunk;
}
__device__ __forceinline__ Chunk chunk_of(uint2 v) { return chunk_of(uint4{v.x, v.y, 0u, 0u}); }

// Fills shared memory with the copies, or with the entries below HOT. `books`: [CODEBOOKS][kEntries][IN_GROUP].
template <int THREADS>
__device__ __forceinline__ void load_books(const unsigned char* books, unsigned char* shared) {
    const Vector* const source = reinterpret_cast<const Vector*>(books);
    Vector* const target = reinterpret_cast<Vector*>(shared);
    if constexpr (COPIES > 0) {
        for (int i = threadIdx.x; i < CODEBOOKS * kEntries * kChunks * COPIES; i += THREADS) {
            const int copied = i / COPIES, chunk = copied / (CODEBOOKS * kEntries);
            target[i] = source[copied % (CODEBOOKS * kEntries) * kChunks + chunk];
        }
    } else {
        for (int i = threadIdx.x; i < HOT * kChunks; i += THREADS) target[i] = source[i];
    }
}

__device__ __forceinline__ Chunk load_chunk(const unsigned char* books, const unsigned char* shared, int book,
                                            uint32_t code, int chunk) {
    if constexpr (COPIES > 0) {
        const uint32_t entry = (chunk * CODEBOOKS + book) * kEntries + code;
        const uint32_t place = entry * (COPIES * kChunkBytes) + threadIdx.x % COPIES * kChunkBytes;
        return chunk_of(*reinterpret_cast<const Vector*>(shared + place));
    }
    const int64_t place = (static_cast<int64_t>(book) * kEntries + code) * (IN_GROUP * 2) + chunk * kChunkBytes;
    if constexpr (HOT > 0) {
        const uint32_t near = shared_address(shared) + code * (IN_GROUP * 2) + chunk * kChunkBytes;
        return chunk_of(load_split(static_cast<int>(code) < HOT, near, books + place));
    } else if constexpr (kChunkBytes == 16) {
        return chunk_of(load_from_l2(reinterpret_cast<const uint4*>(books + place)));
    } else {
        return chunk_of(*reinterpret_cast<const Vector*>(books + place));
    }
}

// The code in place K of a word.
template <int K>
__device__ __forceinline__ uint32_t code_of(uint32_t word) {
    if constexpr (CODE_BYTES == 4) return word;
    return word >> (K * 8 * CODE_BYTES) & (CODE_BYTES == 1 ? 0xffu : 0xffffu);
}

// The codebook of place K in word `word` of a slice; CODEBOOKS or more where there is only padding.
template <int K>
__device__ __forceinline__ int book_of(int word) {
    return SLICE_GROUPS >= 32 ? K * 32 / SLICE_GROUPS : (K * 32 + word) / SLICE_GROUPS;
}
