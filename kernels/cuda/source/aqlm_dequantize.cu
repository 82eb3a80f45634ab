// AQLM weights to rows of bf16 or fp16 numbers.
//
// A thread has a word of four rows, a warp all words of them: their entries become 512 consecutive bytes of a row.
// Macros: those of aqlm_books.cuh, and BLOCKS (on a multiprocessor).
#include "aqlm_books.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"

#ifndef BLOCKS
#define BLOCKS 2
#endif

constexpr int kThreads = TILE_VECTORS;

struct Problem {
    int rows, groups;            // to write, and of the weight's columns
    int slices, row_tiles;       // of the codes
    int first_tile, tiles;       // what to write
    const uint4* codes;          // [slices][row_tiles][TILE_VECTORS]
    const unsigned char* books;  // [CODEBOOKS][kEntries][IN_GROUP] elements
    const float* scales;         // [rows], from the first row to write
    unsigned char* output;       // [rows][groups * IN_GROUP] elements, from the first row to write
};

__device__ __forceinline__ float number(uint32_t word, int half) {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * half);
    return kIsBfloat ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

// Adds the entries of all codes of one row's word that belong to `set`, from place K on.
template <int K>
__device__ __forceinline__ void add_entries(const Problem& problem, const unsigned char* shared, uint32_t word, int set,
                                            int chunk, float (&sums)[kChunkBytes / 2]) {
    const int book = book_of<K>(threadIdx.x % 32);
    if (K % kGroupSets == set && book < CODEBOOKS) {
        const Chunk entry = load_chunk(problem.books, shared, book, code_of<K>(word), chunk);
#pragma unroll
        for (int i = 0; i < kChunkBytes / 2; ++i) sums[i] += number(entry.words[i / 2], i % 2);
    }
    if constexpr (K + 1 < WORD_CODES) add_entries<K + 1>(problem, shared, word, set, chunk, sums);
}

__device__ __forceinline__ void store_chunk(const Problem& problem, int row, int group, int chunk, float scale,
                                            const float (&sums)[kChunkBytes / 2]) {
    alignas(16) uint32_t packed[4] = {};
#pragma unroll
    for (int i = 0; i < kChunkBytes / 4; ++i) {
        const uint32_t upper = element_bits(sums[2 * i + 1] * scale);
        packed[i] = element_bits(sums[2 * i] * scale) | upper << 16;
    }
    const int64_t place = (static_cast<int64_t>(row) * problem.groups + group) * (IN_GROUP * 2) + chunk * kChunkBytes;
    *reinterpret_cast<Vector*>(problem.output + place) = *reinterpret_cast<const Vector*>(packed);
}

__device__ __forceinline__ void write_word(const Problem& problem, const unsigned char* shared, uint32_t word, int slice,
                                           int row) {
    const int lane = threadIdx.x % 32;
    const float scale = row < problem.rows ? problem.scales[row] : 0.0f;
#pragma unroll
    for (int set = 0; set < kGroupSets; ++set) {
        const int group = slice * SLICE_GROUPS + (set * 32 + lane) % SLICE_GROUPS;
        const bool stores = row < problem.rows && group < problem.groups && lane < SLICE_GROUPS;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            float sums[kChunkBytes / 2] = {};
            add_entries<0>(problem, shared, word, set, chunk, sums);
#pragma unroll
            for (int width = SLICE_GROUPS; width < 32; width *= 2) {  // other lanes have other codebooks of the group
#pragma unroll
                for (int i = 0; i < kChunkBytes / 2; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], width);
            }
            if (stores) store_chunk(problem, row, group, chunk, scale, sums);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) aqlm_dequantize(const __grid_constant__ Problem problem) {
    unsigned char* const shared = dynamic_shared();
    load_books<kThreads>(problem.books, shared);
    grid_dependency_launch();
    grid_dependency_wait();  // the output's memory may still be read
    __syncthreads();
    const int total = problem.tiles * problem.slices;
    for (int i = blockIdx.x; i < total; i += gridDim.x) {
        const int slice = i % problem.slices, tile = i / problem.slices;
        const int64_t place =
            (static_cast<int64_t>(slice) * problem.row_tiles + problem.first_tile + tile) * TILE_VECTORS + threadIdx.x;
        const uint4 words = load_once(problem.codes + place);
        const int row = tile * TILE_ROWS + threadIdx.x / 32 * 4;
        write_word(problem, shared, words.x, slice, row);
        write_word(problem, shared, words.y, slice, row + 1);
        write_word(problem, shared, words.z, slice, row + 2);
        write_word(problem, shared, words.w, slice, row + 3);
    }
}
