// FP8 weights times FP8 tokens on Hopper: Y^T = W X^T by wgmma, both from shared memory.
//
// Two warps fetch 128 columns a stage, one of each, by tensor maps; the other warpgroups multiply. With SCALES 0, scales of rows
// and tokens (or of the whole tensors) multiply the finished sums. With SCALES 1 each token has a scale for every 128
// columns, and each block of SCALE_ROWS x 128 weights has one: the product of 128 columns is summed up by the tensor
// cores, scaled, and added in float32, which also keeps long sums exact where the tensor cores alone would not.
//
// Few tokens: the columns of a tile are split among the blocks of a cluster (see wgmma_tile.cuh).
#include "float8_wgmma_shape.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/wgmma.cuh"
#include "wgmma_output.cuh"
#include "wgmma_tile.cuh"

struct Problem {
    Extent extent;
    int token_stride, row_stride;  // of the scales: 0 where one serves all (SCALES 0)
    int padded_tokens;             // length of a line of token scales (SCALES 1)
    int scale_columns;             // blocks of weight scales in a line (SCALES 1)
    const float* token_scales;     // [tokens] or [1]; SCALES 1: [steps][padded tokens]
    const float* row_scales;       // [rows] or [1]; SCALES 1: [blocks of rows][blocks of columns]
    Output output;
};

__device__ __forceinline__ void fetch_weights(const BlockPart& block, const TensorMap* map, int rows, int stage,
                                              const Place& place, int step, uint64_t cache) {
    mbarrier_arrive_expect(block.full(stage), kCodeBytes);
    const uint32_t target = block.shared + kWeightStart + stage * kWeightBytes;
    const int row = static_cast<int>(place.expert()) * rows + place.row();
    tensor_load(target, map, step * 128, row, block.full(stage), cache);
}

__device__ __forceinline__ void fetch_inputs(const BlockPart& block, const TensorMap* map, const Problem& problem, int stage,
                                             const Place& place, int step) {
    constexpr int kPart = TOKENS / MULTICAST;
    const int first = block.sharer * kPart;
    const uint32_t target = block.shared + stage * kInputBytes + first * 128, barrier = block.full(stage);
    mbarrier_arrive_expect(barrier, kInputBytes + kTokenScaleBytes);
    if (MULTICAST == 1) {
        tensor_load(target, map, step * 128, place.token() + first, barrier, kCacheEvictLast);
    } else {
        const uint16_t blocks = ((1 << MULTICAST) - 1) << (block.split * MULTICAST);
        tensor_load_multicast(target, map, step * 128, place.token() + first, barrier, blocks, kCacheEvictLast);
    }
    if (SCALES == 1) {
        const int64_t line = static_cast<int64_t>(step) * problem.padded_tokens + place.line();
        bulk_load(block.shared + kWeightStart + stage * kWeightBytes + kCodeBytes, problem.token_scales + line,
                  kTokenScaleBytes, barrier, kCacheEvictNormal);
    }
}

// The product of one stage, issued and committed.
template <int COUNT>
__device__ __forceinline__ void multiply_stage(const BlockPart& block, int stage, int warpgroup,
                                               float (&sums)[TILES][COUNT], int& accumulate) {
    const uint64_t inputs = wgmma_descriptor(block.shared + stage * kInputBytes);
    const uint64_t weights =
        wgmma_descriptor(block.shared + kWeightStart + stage * kWeightBytes + warpgroup * TILES * 64 * 128);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            wgmma_e4m3(sums[tile], weights + tile * (64 * 128 / 16) + k * 2, inputs + k * 2, accumulate);
        }
        accumulate = 1;
    }
    wgmma_commit();
}

template <int COUNT>
__device__ __forceinline__ void pin(float (&sums)[TILES][COUNT]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) wgmma_pin(sums[tile][i]);
    }
}

// sums += part, scaled by one number a tile and one a token.
template <int COUNT>
__device__ __forceinline__ void add_scaled(float (&sums)[TILES][COUNT], const float (&part)[TILES][COUNT],
                                           const float (&row_scales)[TILES], const float* token_scales) {
    const float2* pairs = reinterpret_cast<const float2*>(token_scales) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < COUNT / 4; ++j) {
        const float2 tokens = pairs[j * 4];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const float scales[2] = {tokens.x * row_scales[tile], tokens.y * row_scales[tile]};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[tile][4 * j + i] = fmaf(part[tile][4 * j + i], scales[i % 2], sums[tile][4 * j + i]);
            }
        }
    }
}

template <int COUNT>
__device__ __forceinline__ void accumulate_blocks(const BlockPart& block, Ring& ring, const Problem& problem,
                                                  const Place& place, int warpgroup, float (&sums)[TILES][COUNT]) {
    float part[TILES][COUNT];
    const float* lines[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[tile][i] = 0.0f;
        const int row = place.row() + (warpgroup * TILES + tile) * 64;
        const int line = (row < problem.extent.rows ? row : problem.extent.rows - 1) / SCALE_ROWS;
        const int64_t lines_before = place.expert() * ((problem.extent.rows + SCALE_ROWS - 1) / SCALE_ROWS);
        lines[tile] = problem.row_scales + (lines_before + line) * problem.scale_columns;
    }
    for (int step = block.first_step; step < block.end_step; ++step, ring.advance()) {
        float row_scales[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) row_scales[tile] = lines[tile][step];
        give_lead(block, ring, warpgroup);
        mbarrier_wait(block.full(ring.stage), ring.phase);
        int accumulate = 0;
        multiply_stage(block, ring.stage, warpgroup, part, accumulate);
        wgmma_wait<0>();
        pin(part);
        const uint8_t* scales = block.memory + kWeightStart + ring.stage * kWeightBytes + kCodeBytes;
        add_scaled(sums, part, row_scales, reinterpret_cast<const float*>(scales));
        __syncwarp();
        block.release(ring.stage);
    }
}

template <int COUNT>
__device__ __forceinline__ void accumulate_all(const BlockPart& block, Ring& ring, int warpgroup,
                                               float (&sums)[TILES][COUNT]) {
    int accumulate = 0, used = -1;
    for (int step = block.first_step; step < block.end_step; ++step, ring.advance()) {
        give_lead(block, ring, warpgroup);
        mbarrier_wait(block.full(ring.stage), ring.phase);
        multiply_stage(block, ring.stage, warpgroup, sums, accumulate);
        wgmma_wait<1>();
        if (used >= 0) block.release(used);
        used = ring.stage;
    }
    wgmma_wait<0>();
    pin(sums);
    block.release(used);
}

struct Accumulate {
    const BlockPart& block;
    Ring& ring;
    const Problem& problem;
    const Place& place;
    int warpgroup;

    template <int COUNT>
    __device__ __forceinline__ void operator()(float (&sums)[TILES][COUNT]) const {
        if constexpr (SCALES == 1) {
            accumulate_blocks(block, ring, problem, place, warpgroup, sums);
        } else {
            accumulate_all(block, ring, warpgroup, sums);
        }
    }
};

// The scales of a warpgroup's tile: fetched before its products, so that they are there when those are done.
struct TileScales {
    static constexpr int kOwn = (TOKENS + 127) / 128;  // tokens of a thread
    float tokens[kOwn];
    float rows[TILES][2];

    __device__ __forceinline__ void fetch(const Problem& problem, const Place& place, int warpgroup) {
        const int thread = threadIdx.x % 128, lane = thread % 32;
        const Extent& extent = problem.extent;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int token = min(place.token() + i * 128 + thread, extent.tokens - 1);
            tokens[i] = load_written(problem.token_scales + token * problem.token_stride);
        }
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i) {
            const int row = place.row() + (warpgroup * TILES + i / 2) * 64 + thread / 32 * 16 + i % 2 * 8 + lane / 4;
            const int64_t own = place.expert() * extent.rows + min(row, extent.rows - 1);
            rows[i / 2][i % 2] = problem.row_scales[own * problem.row_stride];
        }
    }

    // Multiplies the sums by them; `shared` has room for the scales of the tile's tokens.
    __device__ __forceinline__ void apply(float (&sums)[TILES][kAccumulators], float* shared, int warpgroup) const {
        const int thread = threadIdx.x % 128;
        named_barrier_sync(1 + warpgroup, 128);  // the tile before has read its own
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (TOKENS % 128 == 0 || i * 128 + thread < TOKENS) shared[i * 128 + thread] = tokens[i];
        }
        named_barrier_sync(1 + warpgroup, 128);
        const float2* pairs = reinterpret_cast<const float2*>(shared) + thread % 4;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j) {
            const float2 scales = pairs[j * 4];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[tile][4 * j + i] *= (i % 2 == 0 ? scales.x : scales.y) * rows[tile][i / 2];
                }
            }
        }
    }
};

__device__ __forceinline__ void consume(const BlockPart& block, const Problem& problem, int warpgroup) {
    Ring ring;
    float sums[TILES][kAccumulators];
    if (SCALES == 0) grid_dependency_wait();  // the tokens' scales are of the kernel in front
    for (Tiles tiles(problem.extent); tiles.more(); tiles.next()) {
        const Place place = tiles.place(block.sharer);
        await_lead(ring, warpgroup);
        const int tokens = place.end_token(problem.extent) - place.token();
        const Accumulate accumulate{block, ring, problem, place, warpgroup};
        if constexpr (SCALES == 1) {
            for_tokens<TOKENS>(tokens, sums, accumulate);
        } else {
            TileScales scales;
            scales.fetch(problem, place, warpgroup);
            for_tokens<TOKENS>(tokens, sums, accumulate);
            float* shared = reinterpret_cast<float*>(block.memory + kExtraStart) + warpgroup * TOKENS;
            scales.apply(sums, shared, warpgroup);
        }
        put_out(problem.output, problem.extent, block, sums, warpgroup, place);
    }
}

// The warps that fetch: the first thread of each.
__device__ __forceinline__ void fetch_tiles(const BlockPart& block, const TensorMap* inputs, const TensorMap* weights,
                                            const Problem& problem) {
    const int fetcher = threadIdx.x / 32 - kConsumers / 32;
    if (threadIdx.x % 32 != 0 || fetcher >= kFetchers) return;
    const Tiles tiles(problem.extent);
    if (fetcher == 0) {
        grid_dependency_wait();
        produce(block, tiles, [&](int stage, const Place& place, int step) {
            fetch_inputs(block, inputs, problem, stage, place, step);
        });
    } else {
        const uint64_t cache = tiles.token_tiles == 1 ? kCacheEvictFirst : kCacheEvictNormal;
        produce(block, tiles, [&](int stage, const Place& place, int step) {
            fetch_weights(block, weights, problem.extent.rows, stage, place, step, cache);
        });
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS)
    float8_wgmma(const __grid_constant__ TensorMap inputs, const __grid_constant__ TensorMap weights,
                 const __grid_constant__ Problem problem) {
    begin();
    const BlockPart block = enter_block(dynamic_shared(), problem.extent);
    if (threadIdx.x >= kConsumers) {
        warpgroup_give_registers<kProducerRegisters>();
        fetch_tiles(block, &inputs, &weights, problem);
        __syncwarp();
    } else {
        warpgroup_take_registers<kConsumerRegisters>();
        consume(block, problem, threadIdx.x / 128);
    }
    leave_block();
}
