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
// Blocks of a cluster share a range of rows and divide the slices; their sums meet in shared memory, in a fixed order.
// Macros: those of aqlm_elements.cuh with CODE_BYTES = 1; CLUSTER (blocks), WARPS, BATCH (row quads at once: 4 or 8).
#include "aqlm_elements.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cluster_store.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/stream_load.cuh"
#include "ptx/warp_matrix.cuh"

#ifndef CLUSTER
#define CLUSTER 1
#endif
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
constexpr int kTableBytes = kSets * kSetBytes;
constexpr int kBatchRows = BATCH * 4;

struct Problem {
    int rows, groups;        // outputs, and inputs / 8
    int slices, row_tiles;   // of the codes
    int cluster_batches;     // a cluster's share of the rows
    const uint4* codes;      // [slices][row_tiles][TILE_VECTORS]
    const uint2* entries;    // [CODEBOOKS][32 tiles of 8 codes][lane]: the pair of B in two parts
    const float* scales;     // [rows]
    const float* bias;       // [rows] or null
    const uint32_t* input;   // pairs of elements
    uint16_t* output;        // [rows]
};

// Where a cluster's rows begin and end, in batches.
struct Range {
    int first, count;
};

__device__ __forceinline__ Range cluster_range(const Problem& problem) {
    const int total = problem.row_tiles * (TILE_ROWS / kBatchRows);
    const int first = static_cast<int>(blockIdx.x) / CLUSTER * problem.cluster_batches;
    const int left = total - first;
    return {first, left < problem.cluster_batches ? max(left, 0) : problem.cluster_batches};
}

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

__device__ __forceinline__ void make_slice(const Problem& problem, float* tables, int slice) {
    constexpr int kCodeTiles = kEntries / 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
        const uint2* const entries = problem.entries + (CODEBOOKS == 2 ? set : 0) * kCodeTiles * 32;
        uint32_t inputs[4][2];
        load_inputs(problem, slice, set, inputs);
        for (int tile = warp; tile < kCodeTiles; tile += WARPS) {
            make_tables(tables + set * (kSetBytes / 4), inputs, entries[tile * 32 + lane], tile);
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

__device__ __forceinline__ void look_up_batch(const unsigned char* tables, const uint4 (&words)[BATCH], float* sums,
                                              bool first_slice) {
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
        float* const place = sums + part * 16 + lane / 2;
        if (lane % 2 == 0) *place = first_slice ? sum : *place + sum;
    }
}

// The blocks' sums to the block that stores their rows, and from there to the output.
__device__ __forceinline__ void finish(const Problem& problem, const Range& range, const float* sums, float* inbox,
                                       int rank) {
    const int count = range.count * kBatchRows;
    const int share = (problem.cluster_batches * kBatchRows + CLUSTER - 1) / CLUSTER;
    if (CLUSTER > 1) {
        cluster_wait();  // all blocks have begun
        const uint32_t target = shared_address(inbox) + rank * share * 4;
        for (int i = threadIdx.x; i < count; i += kThreads) {
            cluster_store(cluster_map(target + i % share * 4, i / share), sums[i]);
        }
        cluster_arrive();
        cluster_wait();
    }
    for (int i = threadIdx.x; i < share; i += kThreads) {
        const int local = rank * share + i, row = range.first * kBatchRows + local;
        if (local >= count || row >= problem.rows) break;
        float sum = CLUSTER > 1 ? inbox[i] : sums[i];
#pragma unroll
        for (int other = 1; other < CLUSTER; ++other) sum += inbox[other * share + i];
        const float bias = problem.bias == nullptr ? 0.0f : problem.bias[row];
        problem.output[row] = element_bits(fmaf(sum, problem.scales[row], bias));
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) aqlm_lookup(const __grid_constant__ Problem problem) {
    unsigned char* const tables = dynamic_shared();
    float* const sums = reinterpret_cast<float*>(tables + kTableBytes);
    float* const inbox = sums + problem.cluster_batches * kBatchRows;
    const int warp = threadIdx.x / 32, rank = static_cast<int>(blockIdx.x) % CLUSTER;
    const Range range = cluster_range(problem);
    if (CLUSTER > 1) cluster_arrive_relaxed();
    int slice = rank, batch = warp;
    uint4 next[BATCH];
    if (batch < range.count && slice < problem.slices) load_batch(problem, slice, range.first + batch, next);
    grid_dependency_launch();
    grid_dependency_wait();
    for (int current = rank; current < problem.slices; current += CLUSTER) {
        make_slice(problem, reinterpret_cast<float*>(tables), current);
        __syncthreads();
        while (slice == current && batch < range.count) {
            uint4 words[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) words[i] = next[i];
            const int done = batch;
            batch += WARPS;
            if (batch >= range.count) {
                batch = warp;
                slice += CLUSTER;
            }
            if (slice < problem.slices) load_batch(problem, slice, range.first + batch, next);
            look_up_batch(tables, words, sums + done * kBatchRows, current == rank);
        }
        __syncthreads();  // the tables are free, or the sums complete
    }
    if (rank >= problem.slices) {  // more blocks than slices: nothing to add
        for (int i = threadIdx.x; i < range.count * kBatchRows; i += kThreads) sums[i] = 0.0f;
        __syncthreads();
    }
    finish(problem, range, sums, inbox, rank);
}
