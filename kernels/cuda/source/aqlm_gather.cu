// A few tokens times AQLM weights of any shape: the entries that the codes name are the A operand of mma.sync.
//
// A warp has the 32 rows of a tile. Lane (g, t) gathers entries for the rows 4 g .. 4 g + 3, in two pairs: rows g and g + 8
// of a fragment may be any two, and so may the columns, as long as B has them in the same order. So an entry of 8 numbers
// goes from memory into the fragments of two instructions as it is, whatever its codebook; sums over codebooks, groups and
// columns are all in the accumulators, in float32, for eight tokens at the price of one.
//
// The warps of a block share a tile of rows and divide its columns; their sums meet in shared memory in a fixed order.
// Macros: those of aqlm_books.cuh, TOKEN_TILES (of 8 tokens), WARPS, BLOCKS (on a multiprocessor).
#include "aqlm_books.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/stream_load.cuh"
#include "ptx/warp_matrix.cuh"

#ifndef TOKEN_TILES
#define TOKEN_TILES 1
#endif
#ifndef WARPS
#define WARPS 16
#endif
#ifndef BLOCKS
#define BLOCKS 1
#endif

constexpr int kThreads = WARPS * 32;
constexpr int kProducts = kChunkBytes / 8;                // matrix instructions for a chunk
constexpr int kSteps = 8;                                 // of a slice: 4 lanes' words each
struct Problem {
    int rows, groups, tokens;
    int slices, row_tiles;
    const uint4* codes;         // [slices][row_tiles][TILE_VECTORS]
    const unsigned char* books;  // [CODEBOOKS][kEntries][IN_GROUP] elements
    const float* scales;        // [rows]
    const float* bias;          // [rows] or null
    const unsigned char* input;  // [tokens][groups * IN_GROUP] elements
    uint16_t* output;           // [tokens][rows]
};

__device__ __forceinline__ void load_inputs(const Problem& problem, int slice, int word,
                                            Chunk (&inputs)[kGroupSets][kChunks][TOKEN_TILES]) {
    const int row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int set = 0; set < kGroupSets; ++set) {
        const int group = slice * SLICE_GROUPS + (set * 32 + word) % SLICE_GROUPS;
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile) {
            const int token = tile * 8 + row;
            const bool valid = token < problem.tokens && group < problem.groups;
            const int64_t place = (static_cast<int64_t>(token) * problem.groups + group) * (IN_GROUP * 2);
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                inputs[set][chunk][tile] = Chunk{};
                if (valid) {
                    const unsigned char* const source = problem.input + place + chunk * kChunkBytes;
                    inputs[set][chunk][tile] = chunk_of(*reinterpret_cast<const Vector*>(source));
                }
            }
        }
    }
}

// All codes in place K of four rows' words.
template <int K>
__device__ __forceinline__ void multiply_codes(const Problem& problem, const unsigned char* shared, int word,
                                               const uint32_t (&words)[4],
                                               const Chunk (&inputs)[kGroupSets][kChunks][TOKEN_TILES],
                                               float (&sums)[2][TOKEN_TILES][4]) {
    const int book = book_of<K>(word);
    if (SLICE_GROUPS < 32 || K * 32 / SLICE_GROUPS < CODEBOOKS) {
        const bool valid = book < CODEBOOKS;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                Chunk upper{}, lower{};
                if (valid) {
                    upper = load_chunk(problem.books, shared, book, code_of<K>(words[pair * 2]), chunk);
                    lower = load_chunk(problem.books, shared, book, code_of<K>(words[pair * 2 + 1]), chunk);
                }
#pragma unroll
                for (int tile = 0; tile < TOKEN_TILES; ++tile) {
                    const Chunk& x = inputs[K % kGroupSets][chunk][tile];
#pragma unroll
                    for (int i = 0; i < kProducts; ++i) {
                        const uint32_t a[4] = {upper.words[2 * i], lower.words[2 * i], upper.words[2 * i + 1],
                                               lower.words[2 * i + 1]};
                        multiply_add<kIsBfloat>(sums[pair][tile], a, x.words[2 * i], x.words[2 * i + 1]);
                    }
                }
            }
        }
    }
    if constexpr (K + 1 < WORD_CODES) multiply_codes<K + 1>(problem, shared, word, words, inputs, sums);
}

__device__ __forceinline__ uint4 load_words(const Problem& problem, int tile, int step) {
    const int lane = threadIdx.x % 32;
    const int64_t place = (static_cast<int64_t>(step / kSteps) * problem.row_tiles + tile) * TILE_VECTORS;
    return load_once(problem.codes + place + lane / 4 * 32 + step % kSteps * 4 + lane % 4);
}

// The warps' sums of a tile to the output, eight tokens at a time.
__device__ __forceinline__ void store_tile(const Problem& problem, int tile, float* memory,
                                           const float (&sums)[2][TOKEN_TILES][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
        if (token_tile * 8 >= problem.tokens) break;
        __syncthreads();  // the memory is free
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 * 4 + pair * 2 + i / 2, token = lane % 4 * 2 + i % 2;
                memory[(warp * 8 + token) * TILE_ROWS + row] = sums[pair][token_tile][i];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 8 * TILE_ROWS; i += kThreads) {
            const int token = token_tile * 8 + i / TILE_ROWS, row = tile * TILE_ROWS + i % TILE_ROWS;
            if (token >= problem.tokens || row >= problem.rows) continue;
            float sum = memory[i];
#pragma unroll
            for (int other = 1; other < WARPS; ++other) sum += memory[other * 8 * TILE_ROWS + i];
            const float bias = problem.bias == nullptr ? 0.0f : problem.bias[row];
            problem.output[static_cast<int64_t>(token) * problem.rows + row] =
                element_bits(fmaf(sum, problem.scales[row], bias));
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) aqlm_gather(const __grid_constant__ Problem problem) {
    unsigned char* const shared = dynamic_shared();
    float* const memory = reinterpret_cast<float*>(shared + kBookBytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, steps = problem.slices * kSteps;
    int tile = blockIdx.x, step = warp;
    uint4 next{};
    if (tile < problem.row_tiles && step < steps) next = load_words(problem, tile, step);
    load_books<kThreads>(problem.books, shared);
    grid_dependency_launch();
    grid_dependency_wait();
    __syncthreads();
    for (; tile < problem.row_tiles; tile += gridDim.x) {
        float sums[2][TOKEN_TILES][4] = {};
        for (int current = warp; current < steps; current += WARPS) {
            const uint32_t words[4] = {next.x, next.y, next.z, next.w};
            int next_tile = tile;
            step = current + WARPS;
            if (step >= steps) {
                step = warp;
                next_tile += gridDim.x;
            }
            if (next_tile < problem.row_tiles) next = load_words(problem, next_tile, step);
            const int word = current % kSteps * 4 + lane % 4;
            Chunk inputs[kGroupSets][kChunks][TOKEN_TILES];
            load_inputs(problem, current / kSteps, word, inputs);
            multiply_codes<0>(problem, shared, word, words, inputs, sums);
        }
        store_tile(problem, tile, memory, sums);
    }
}
