// One token times AQLM weights whose codes have at most 8 bits, by tables of dot products.
//
// For a group of 8 inputs, the product with each of a codebook's 256 entries is computed once, into a table; an output is
// then the sum of one number from each table. A block keeps the 128 tables of a slice in shared memory, entry c of table T
// at word c * 64 + T % 64 of its set T / 64: each lane reads tables of its own bank, so 32 lanes with 32 different codes
// never meet. Against gathering the codebook's entries this reads 4 bytes a code in place of 16, and adds once in place of
// eight times.
//
// The tables are made by matrix instructions: A is the input, a group a row, B the entries, a code a column, in two parts
// (value and rest) whose sum is exact to twice the input's precision. So that the 32 lanes of a store have 32 banks, each
// of a fragment's four pairs of columns belongs to other groups: B is masked to one pair for each of four instructions.
//
// A block has a slice and a range of rows; the last block of a range adds up all slices' sums.
// Macros: those of aqlm_elements.cuh with CODE_BYTES = 1; WARPS, BATCH (row quads at once: 4 or 8).
#include "aqlm_combine.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/stream_load.cuh"
#include "ptx/warp_matrix.cuh"

#ifndef WARPS
#define WARPS 16
#endif
#ifndef BATCH
#define BATCH 4
#endif

static_assert(CODE_BYTES == 1 && (CODEBOOKS == 1 || CODEBOOKS == 2), "tables for two codebooks of 256 entries");
static_assert(BATCH == 4 || BATCH == 8, "16 or 32 rows");

constexpr int kThreads = WARPS * 32;
constexpr int kSets = 2, kSetTables = 64, kEntries = 256;
constexpr int kSetBytes = kEntries * kSetTables * 4;
constexpr int kBatchRows = BATCH * 4;
constexpr int kCodeTiles = kEntries / 8, kTurns = (kCodeTiles + WARPS - 1) / WARPS;

struct Problem {
    int rows, groups;       // outputs, and inputs / 8
    int slices, row_tiles;  // of the codes
    int range_batches;      // of a block
    const uint4* codes;     // [slices][row_tiles][TILE_VECTORS]
    const uint2* entries;   // [CODEBOOKS][32 tiles of 8 codes][lane]: the pair of B in two parts
    const float* scales;    // [rows]
    const float* bias;      // [rows] or null
    const uint32_t* input;  // pairs of elements
    uint16_t* output;       // [rows]
    float* partials;        // [slices][row_tiles * TILE_ROWS]
    int* counters;          // [ranges of rows], zeros
};

__device__ __forceinline__ void load_batch(const Problem& problem, int slice, int batch, uint4 (&words)[BATCH]) {
    const int64_t place = static_cast<int64_t>(slice) * problem.row_tiles * TILE_VECTORS +
                          static_cast<int64_t>(batch) * (BATCH * 32) + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) words[i] = load_once(problem.codes + place + i * 32);
}

// The fragments of 64 tables' inputs: pair t of row q * 8 + g + 32 * half.
__device__ __forceinline__ void load_inputs(const Problem& problem, int slice, int set, uint32_t (&inputs)[4][2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int table = set * kSetTables + half * 32 + q * 8 + lane / 4;
            const int group = slice * SLICE_GROUPS + table % SLICE_GROUPS;
            inputs[q][half] = group < problem.groups ? problem.input[group * 4 + lane % 4] : 0u;
        }
    }
}

// 64 tables, 8 codes: four products with the masked entries leave lane (g, t) the tables of group (t + s) % 4.
__device__ __forceinline__ void make_tables(float* set_tables, const uint32_t (&inputs)[4][2], uint2 entry,
                                            int code_tile) {
    const int lane = threadIdx.x % 32, row = lane / 4, pair = lane % 4;
    uint32_t value[4], rest[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        value[q] = lane / 8 == q ? entry.x : 0u;
        rest[q] = lane / 8 == q ? entry.y : 0u;
    }
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        float sums[4] = {};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const uint32_t a[4] = {inputs[q][0], inputs[q][1], inputs[q][0], inputs[q][1]};
            multiply_add<kIsBfloat>(sums, a, value[(q - s) & 3], rest[(q - s) & 3]);
        }
        float* const target = set_tables + (code_tile * 8 + pair * 2) * kSetTables + ((pair + s) & 3) * 8 + row;
        target[0] = sums[0];
        target[kSetTables] = sums[1];
        target[32] = sums[2];
        target[kSetTables + 32] = sums[3];
    }
}

// A warp's part of the entries, which no kernel in front changes.
__device__ __forceinline__ void load_entries(const Problem& problem, uint2 (&entries)[kSets][kTurns]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
        const uint2* const book = problem.entries + (CODEBOOKS == 2 ? set : 0) * kCodeTiles * 32;
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int tile = turn * WARPS + warp;
            entries[set][turn] = tile < kCodeTiles ? book[tile * 32 + lane] : uint2{};
        }
    }
}

__device__ __forceinline__ void make_slice(const Problem& problem, float* tables, int slice,
                                           const uint2 (&entries)[kSets][kTurns]) {
    uint32_t inputs[kSets][4][2];
#pragma unroll
    for (int set = 0; set < kSets; ++set) load_inputs(problem, slice, set, inputs[set]);
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int tile = turn * WARPS + threadIdx.x / 32;
            if (kCodeTiles % WARPS != 0 && tile >= kCodeTiles) break;
            make_tables(tables + set * (kSetBytes / 4), inputs[set], entries[set][turn], tile);
        }
    }
}

// The sum of one row's four numbers that this lane has.
__device__ __forceinline__ float look_up(const unsigned char* tables, uint32_t word) {
    const uint32_t column = threadIdx.x % 32 * 4;
    float found[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint32_t place = __byte_perm(word, column, 0x5504 | k << 4);  // code * 256 + column
        found[k] = *reinterpret_cast<const float*>(tables + place + (k & 1) * 128 + (k >> 1) * kSetBytes);
    }
    return (found[0] + found[1]) + (found[2] + found[3]);
}

// Adds up 16 numbers of each lane over the warp: lane l gets the sum of number l / 2.
__device__ __forceinline__ float sum_over_warp(float (&values)[16]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int width = 8; width > 0; width /= 2) {
        const bool upper = lane & width * 2;
#pragma unroll
        for (int i = 0; i < width; ++i) {
            const float kept = upper ? values[i + width] : values[i], sent = upper ? values[i] : values[i + width];
            values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, width * 2);
        }
    }
    return values[0] + __shfl_xor_sync(0xffffffffu, values[0], 1);
}

__device__ __forceinline__ void look_up_batch(const unsigned char* tables, const uint4 (&words)[BATCH], float* sums) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int part = 0; part < BATCH / 4; ++part) {
        float values[16];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 vector = words[part * 4 + i];
            values[i * 4] = look_up(tables, vector.x);
            values[i * 4 + 1] = look_up(tables, vector.y);
            values[i * 4 + 2] = look_up(tables, vector.z);
            values[i * 4 + 3] = look_up(tables, vector.w);
        }
        const float sum = sum_over_warp(values);
        if (lane % 2 == 0) sums[part * 16 + lane / 2] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) aqlm_lookup(const __grid_constant__ Problem problem) {
    unsigned char* const tables = dynamic_shared();
    const int warp = threadIdx.x / 32, slice = blockIdx.x;
    const int first = blockIdx.y * problem.range_batches;
    const int end = min(first + problem.range_batches, problem.row_tiles * (TILE_ROWS / kBatchRows));
    int batch = first + warp;
    uint4 next[BATCH];
    uint2 entries[kSets][kTurns];
    load_entries(problem, entries);
    if (batch < end) load_batch(problem, slice, batch, next);
    grid_dependency_launch();
    grid_dependency_wait();
    make_slice(problem, reinterpret_cast<float*>(tables), slice, entries);
    __syncthreads();
    const int64_t line = static_cast<int64_t>(problem.row_tiles) * TILE_ROWS;
    float* const sums = problem.partials + slice * line;
    for (; batch < end; batch += WARPS) {
        uint4 words[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) words[i] = next[i];
        if (batch + WARPS < end) load_batch(problem, slice, batch + WARPS, next);
        look_up_batch(tables, words, sums + static_cast<int64_t>(batch) * kBatchRows);
    }
    if (!ends_last(problem.counters + blockIdx.y, problem.slices)) return;
    combine<kThreads>(problem.partials, line, problem.slices, first * kBatchRows, min(end * kBatchRows, problem.rows),
                      problem.scales, problem.bias, problem.output);
}
