// Integer weights times many tokens on any GPU since Ampere: Y^T = W X^T by mma.sync, with W as the A operand.
//
// A block multiplies 128 rows of the weight with TOKENS rows of the input; each of its four warps has 32 rows, turns their
// codes into fragments, and reads the input's fragments from shared memory. Codes, scales and inputs come by cp.async, a
// chunk of 64 columns a stage. Blocks of SPLIT parts of the columns leave float sums, which integer_mma_sum adds up.
#include "grouped_tiles.cuh"
#include "integer_fragments.cuh"
#include "integer_stage.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/warp_matrix.cuh"

#ifndef TOKENS
#define TOKENS 64
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef SPLIT
#define SPLIT 1
#endif

static_assert(CHUNKS == 1, "a stage is one chunk");
static_assert(TOKENS % 16 == 0 && TOKENS <= 128, "pairs of matrices of 8 tokens, and room for the sums");

constexpr int kWarps = 4, kTiles = 2;  // tiles of 16 rows a warp
constexpr int kThreads = kWarps * 32, kRows = kWarps * kTiles * 16, kSuperRows = kRows / 64;
constexpr int kInputBytes = TOKENS * 128, kStageBytes = kInputBytes + kSuperRows * kSuperRowBytes;
constexpr int kOutputStride = kRows + 8;

struct Problem {
    int rows, tokens, chunks, width;  // width: of a row of the input, a multiple of 8
    PackedWeights weights;
    const uint16_t* input;  // [tokens][width]
    const float* bias;      // [rows] or null
    uint16_t* output;       // [tokens][rows]
    float* partials;        // [SPLIT][tokens][rows]
#if GROUPED
    GroupTiles groups;
#endif
};
static_assert(!GROUPED || SPLIT == 1, "experts have tiles enough");

// The problem of the expert that a tile of tokens belongs to.
__device__ __forceinline__ Problem of_group(const Problem& problem, const GroupTile& tile) {
    Problem own = problem;
    const int64_t super_rows = static_cast<int64_t>(tile.expert) * ((problem.rows + 63) / 64);
    const int64_t values = super_rows * problem.weights.groups * 64;
    own.tokens = tile.end;
    own.weights.codes += super_rows * problem.chunks * kChunkBytes;
    own.weights.scales += values * kScaleBytes;
    if (ZEROS == 1) own.weights.zeros += values;
    if (ZEROS == 2) own.weights.offsets += values * kScaleBytes;
    if (problem.bias != nullptr) own.bias += static_cast<int64_t>(tile.expert) * problem.rows;
    return own;
}

__device__ __forceinline__ float bias_of(const Problem& problem, int row) {
    return problem.bias == nullptr ? 0.0f : problem.bias[row];
}

__device__ __forceinline__ uint16_t output_bits(float value) {
    return kIsBfloat ? __bfloat16_as_ushort(__float2bfloat16_rn(value)) : __half_as_ushort(__float2half_rn(value));
}

__device__ __forceinline__ void copy_line(uint8_t* target, const uint8_t* source, int bytes) {
    for (int i = threadIdx.x * 16; i < bytes; i += kThreads * 16) copy_async<16>(target + i, source + i, true);
}

__device__ __forceinline__ void fetch(const Problem& problem, uint8_t* stage, int chunk, int first_super_row,
                                      int first_token) {
    for (int i = threadIdx.x; i < TOKENS * 8; i += kThreads) {
        const int token = i / 8, vector = i % 8, column = chunk * 64 + vector * 8;
        const bool valid = first_token + token < problem.tokens && column < problem.width;
        const int64_t place = static_cast<int64_t>(first_token + token) * problem.width + column;
        copy_async<16>(stage + token * 128 + ((vector ^ token % 8) * 16), problem.input + (valid ? place : 0), valid);
    }
    const PackedWeights& packed = problem.weights;
    uint8_t* target = stage + kInputBytes;
#pragma unroll
    for (int i = 0; i < kSuperRows; ++i, target += kSuperRowBytes) {
        const int64_t row = first_super_row + i;
        if (row * 64 >= problem.rows) break;
        copy_line(target, packed.codes + (row * problem.chunks + chunk) * kChunkBytes, kChunkBytes);
        if (GROUP == 0) continue;
        const int64_t line = packed.line(row, chunk) * 64;
        copy_line(target + kCodeBytes, packed.scales + line * kScaleBytes, kScaleStage);
        if (ZEROS == 1) copy_line(target + kCodeBytes + kScaleStage, packed.zeros + line, kZeroStage);
        if (ZEROS == 2) {
            copy_line(target + kCodeBytes + kScaleStage, packed.offsets + line * kScaleBytes, kOffsetStage);
        }
        if (kSupers) copy_line(target + kSuperStart, packed.super_line(row, problem.chunks, chunk), kSuperStage);
    }
}

// A warp's part of one k16-step.
template <int STEP>
__device__ __forceinline__ void multiply_step(const uint8_t* stage, const uint8_t* (&weights)[kTiles],
                                              const int (&places)[kTiles], float factor,
                                              const LaneCodes<CODE_BITS> (&codes)[kTiles],
                                              GroupValues (&values)[kTiles], float (&sums)[kTiles][TOKENS / 8][4]) {
    constexpr int kStepsPerGroup = GROUP != 0 && GROUP < 64 ? GROUP / 16 : 4;
    const int lane = threadIdx.x % 32;
    uint32_t fragments[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        if (STEP % kStepsPerGroup == 0) values[tile].load(weights[tile], STEP / kStepsPerGroup, places[tile], factor);
        make_fragment<STEP>(codes[tile], values[tile], fragments[tile]);
    }
#pragma unroll
    for (int j = 0; j < TOKENS / 16; ++j) {
        const int token = j * 16 + lane / 16 * 8 + lane % 8, vector = STEP * 2 + lane / 8 % 2;
        uint32_t inputs[4];
        load_matrices<false>(inputs, stage + token * 128 + ((vector ^ token % 8) * 16));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            multiply_add<kIsBfloat>(sums[tile][2 * j], fragments[tile], inputs[0], inputs[1]);
            multiply_add<kIsBfloat>(sums[tile][2 * j + 1], fragments[tile], inputs[2], inputs[3]);
        }
    }
    if constexpr (STEP < 3) multiply_step<STEP + 1>(stage, weights, places, factor, codes, values, sums);
}

__device__ __forceinline__ void multiply_chunk(const Problem& problem, const uint8_t* stage,
                                               float (&sums)[kTiles][TOKENS / 8][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint8_t* weights[kTiles];
    int places[kTiles];
    LaneCodes<CODE_BITS> codes[kTiles];
    GroupValues values[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        const int index = warp * kTiles + tile;
        weights[tile] = stage + kInputBytes + index / 4 * kSuperRowBytes;
        places[tile] = lane / 4 * 8 + index % 4 * 2;
        codes[tile] = load_codes<CODE_BITS>(weights[tile] + index % 4 * (kChunkBytes / 4), lane);
    }
    multiply_step<0>(stage, weights, places, problem.weights.scale_factor, codes, values, sums);
}

// Sums to the output: through shared memory, so that global memory sees whole lines.
__device__ __forceinline__ void store(const Problem& problem, uint8_t* memory,
                                      const float (&sums)[kTiles][TOKENS / 8][4], int first_row, int first_token) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* const partials =
        problem.partials + (static_cast<int64_t>(blockIdx.z) * problem.tokens + first_token) * problem.rows + first_row;
    uint16_t* const staging = reinterpret_cast<uint16_t*>(memory);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = (warp * kTiles + tile) * 16 + half * 8 + lane / 4, global_row = first_row + row;
            if (global_row >= problem.rows) continue;
            const float factor = kScalesSums ? row_factor(problem.weights, global_row, problem.rows) : 1.0f;
            const float bias = SPLIT == 1 ? bias_of(problem, global_row) : 0.0f;
#pragma unroll
            for (int j = 0; j < TOKENS / 8; ++j) {
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    const int token = j * 8 + lane % 4 * 2 + odd;
                    const float value = fmaf(sums[tile][j][half * 2 + odd], factor, bias);
                    if (SPLIT == 1) {
                        staging[token * kOutputStride + row] = output_bits(value);
                    } else if (first_token + token < problem.tokens) {
                        partials[static_cast<int64_t>(token) * problem.rows + row] = value;
                    }
                }
            }
        }
    }
    if (SPLIT > 1) return;
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * kRows; i += kThreads) {
        const int token = i / kRows, row = i % kRows;
        if (first_token + token >= problem.tokens) break;
        if (first_row + row >= problem.rows) continue;
        const int64_t place = static_cast<int64_t>(first_token + token) * problem.rows + first_row + row;
        problem.output[place] = staging[token * kOutputStride + row];
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) integer_mma(const __grid_constant__ Problem whole) {
    uint8_t* const memory = dynamic_shared();
    if (!GROUPED) grid_dependency_launch();
    fill_code_table();
    grid_dependency_wait();
#if GROUPED
    grid_dependency_launch();  // no sooner, see enter_group
    if (blockIdx.y >= whole.groups.size()) return;
    const GroupTile tile = whole.groups.tile(blockIdx.y);
    const Problem problem = of_group(whole, tile);
    const int first_token = tile.first;
#else
    const Problem& problem = whole;
    const int first_token = blockIdx.y * TOKENS;
#endif
    const int first_row = blockIdx.x * kRows;
    const int first = problem.chunks * static_cast<int>(blockIdx.z) / SPLIT;
    const int end = problem.chunks * static_cast<int>(blockIdx.z + 1) / SPLIT;
    float sums[kTiles][TOKENS / 8][4] = {};
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (first + i < end) fetch(problem, memory + i * kStageBytes, first + i, first_row / 64, first_token);
        copy_async_commit();
    }
    for (int chunk = first, stage = 0; chunk < end; ++chunk, stage = stage + 1 == STAGES ? 0 : stage + 1) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // the stage is there, and the one before it is free
        const int ahead = chunk + STAGES - 1, free = stage == 0 ? STAGES - 1 : stage - 1;
        if (ahead < end) fetch(problem, memory + free * kStageBytes, ahead, first_row / 64, first_token);
        copy_async_commit();
        multiply_chunk(problem, memory + stage * kStageBytes, sums);
    }
    copy_async_wait<0>();
    __syncthreads();
    store(problem, memory, sums, first_row, first_token);
}

// Adds up what the parts of the columns gave, in their order.
extern "C" __global__ void __launch_bounds__(256) integer_mma_sum(const __grid_constant__ Problem problem) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int row = blockIdx.x * 256 + threadIdx.x;
    if (row >= problem.rows) return;
    const int64_t place = static_cast<int64_t>(blockIdx.y) * problem.rows + row;
    float sum = bias_of(problem, row);
#pragma unroll
    for (int part = 0; part < SPLIT; ++part) {
        sum += __ldcg(problem.partials + static_cast<int64_t>(part) * problem.tokens * problem.rows + place);
    }
    problem.output[place] = output_bits(sum);
}
