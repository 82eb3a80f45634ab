// Integer weights times many tokens on Hopper: Y^T = W X^T by wgmma, with W as the register operand.
//
// Some warps fetch: codes and scales as contiguous bytes, inputs as swizzled tiles by a tensor map, several stages ahead.
// Each other warpgroup turns the codes of its 64-row tiles into fragments, in the very registers that wgmma reads, while
// its previous products run; the packed layout needs no shuffle for that. For few tokens the codes are multiplied as they
// are, and the sums of each group scaled (SUM_GROUPS). The weights do not depend on the kernel in front, so only the
// inputs wait for it.
//
// Few tokens give few tiles: then the columns of a tile are split among the blocks of a cluster, which add up through
// distributed shared memory in a fixed order. Many tokens: blocks stay and take tile after tile, and pairs of blocks
// fetch each input once for both (MULTICAST).
#include "integer_wgmma_shape.cuh"
#include "integer_fragments.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/wgmma.cuh"
#include "wgmma_output.cuh"
#include "wgmma_tile.cuh"

struct Problem {
    Extent extent;  // a step is CHUNKS chunks of 64 columns
    PackedWeights weights;
    Output output;
};

// Codes, scales, zero points and offsets of every kWeightFetchers-th super row, from the `fetcher`th.
__device__ __forceinline__ void fetch_weights(const BlockPart& block, const Problem& problem, int fetcher, int stage,
                                              const Place& place, int step, uint64_t cache) {
    const PackedWeights& packed = problem.weights;
    const uint32_t barrier = block.full(stage), target = block.shared + kWeightStart + stage * kWeightBytes;
    const int super_rows = (problem.extent.rows + 63) / 64, first = place.row_tile * kSuperRows, left = super_rows - first;
    const int end = left < kSuperRows ? left : kSuperRows, chunk = step * CHUNKS;
    const int count = (end - fetcher + kWeightFetchers - 1) / kWeightFetchers;
    mbarrier_arrive_expect(barrier, count > 0 ? count * kSuperRowBytes : 0);
#pragma unroll
    for (int i = 0; i < kSuperRows; i += kWeightFetchers) {
        const int index = i + fetcher;
        if (index >= end) break;
        const int64_t row = place.expert() * super_rows + first + index, chunks = problem.extent.steps * CHUNKS;
        const uint32_t codes = target + index * kSuperRowBytes;
        bulk_load(codes, packed.codes + (row * chunks + chunk) * kChunkBytes, kCodeBytes, barrier, cache);
        if (GROUP == 0) continue;
        const int64_t line = packed.line(row, chunk) * 64;
        bulk_load(codes + kCodeBytes, packed.scales + line * kScaleBytes, kScaleStage, barrier, cache);
        const uint32_t behind = codes + kCodeBytes + kScaleStage;
        if (ZEROS == 1) bulk_load(behind, packed.zeros + line, kZeroStage, barrier, cache);
        if (ZEROS == 2) bulk_load(behind, packed.offsets + line * kScaleBytes, kOffsetStage, barrier, cache);
        if (kSupers) bulk_load(codes + kSuperStart, packed.super_line(row, chunks, chunk), kSuperStage, barrier, cache);
    }
}

__device__ __forceinline__ void fetch_inputs(const BlockPart& block, const TensorMap* map, int stage,
                                             const Place& place, int step) {
    constexpr int kPart = TOKENS / MULTICAST;
    const int first = block.sharer * kPart;
    mbarrier_arrive_expect(block.full(stage), kInputBytes);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const uint32_t target = block.shared + stage * kInputBytes + (i * TOKENS + first) * 128;
        const int column = (step * CHUNKS + i) * 64, token = place.token() + first;
        if (MULTICAST == 1) {
            tensor_load(target, map, column, token, block.full(stage), kCacheEvictLast);
        } else {
            const uint16_t blocks = ((1 << MULTICAST) - 1) << (block.split * MULTICAST);
            tensor_load_multicast(target, map, column, token, block.full(stage), blocks, kCacheEvictLast);
        }
    }
}

// The warps that fetch: the first thread of each.
__device__ __forceinline__ void fetch_tiles(const BlockPart& block, const TensorMap* map, const Problem& problem) {
    const int fetcher = threadIdx.x / 32 - kConsumers / 32;
    if (threadIdx.x % 32 != 0 || fetcher >= kFetchers) return;
    const Tiles tiles(problem.extent);
    if (fetcher == kWeightFetchers) {
        grid_dependency_wait();
        produce(block, tiles, [&](int stage, const Place& place, int step) {
            fetch_inputs(block, map, stage, place, step);
        });
    } else {
        const uint64_t cache = tiles.token_tiles == 1 ? kCacheEvictFirst : kCacheEvictNormal;
        produce(block, tiles, [&](int stage, const Place& place, int step) {
            fetch_weights(block, problem, fetcher, stage, place, step, cache);
        });
    }
}

template <int COUNT>
__device__ __forceinline__ void multiply(float (&sums)[COUNT], const uint32_t (&fragment)[4],
                                         uint64_t descriptor, int accumulate) {
    if (kIsBf16) {
        wgmma_bf16(sums, fragment, descriptor, accumulate);
    } else {
        wgmma_f16(sums, fragment, descriptor, accumulate);
    }
}

// One chunk of 64 columns: four steps, STEPS at a time; while some are converted, those before are multiplied.
template <int FIRST, int COUNT, typename AfterFirst>
__device__ __forceinline__ void multiply_steps(float (&sums)[TILES][COUNT], const LaneCodes<CODE_BITS> (&codes)[TILES],
                                               GroupValues (&values)[TILES], uint32_t (&fragments)[2][STEPS][TILES][4],
                                               const uint8_t* weights, int first_group, int place, float factor,
                                               uint64_t inputs, int& accumulate, const AfterFirst& after_first) {
    constexpr int kBuffer = FIRST / STEPS % 2;
    constexpr int kStepsPerGroup = GROUP != 0 && GROUP < 64 ? GROUP / 16 : 4;
    if constexpr (FIRST % kStepsPerGroup == 0) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            values[tile].load(weights + tile * kSuperRowBytes, first_group + FIRST / kStepsPerGroup, place, factor);
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) make_fragment<FIRST>(codes[tile], values[tile], fragments[kBuffer][0][tile]);
    if constexpr (STEPS == 2) {
        if constexpr ((FIRST + 1) % kStepsPerGroup == 0) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                values[tile].load(weights + tile * kSuperRowBytes, first_group + (FIRST + 1) / kStepsPerGroup, place,
                                  factor);
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            make_fragment<FIRST + 1>(codes[tile], values[tile], fragments[kBuffer][STEPS - 1][tile]);
        }
    }
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            multiply(sums[tile], fragments[kBuffer][step][tile], inputs + (FIRST + step) * 2, accumulate);
        }
        accumulate = 1;
    }
    wgmma_commit();
    wgmma_wait<1>();
    if constexpr (FIRST == 0) after_first();
    if constexpr (FIRST + STEPS < 4) {
        multiply_steps<FIRST + STEPS>(sums, codes, values, fragments, weights, first_group, place, factor, inputs,
                                      accumulate, after_first);
    }
}

// sums += products times the scales of a group, once those are done.
template <int COUNT>
__device__ __forceinline__ void add_group(float (&sums)[TILES][COUNT], float (&products)[TILES][COUNT],
                                          const uint8_t* weights, int group, int place, float factor) {
    wgmma_wait<0>();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        float scales[2];
        PairValue::load_exact(weights + tile * kSuperRowBytes + kCodeBytes + group * 64 * kScaleBytes, place, factor, scales);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            wgmma_pin(products[tile][i]);
            sums[tile][i] = fmaf(products[tile][i], scales[i / 2 % 2], sums[tile][i]);
        }
    }
}

// A warpgroup's tiles over the block's columns, for the first 2 * COUNT tokens.
template <int COUNT>
__device__ __forceinline__ void accumulate_tile(const BlockPart& block, const Problem& problem, Ring& ring, int warpgroup,
                                                float (&sums)[TILES][COUNT]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int place = lane / 4 * 8 + warp * 2;
    uint32_t fragments[2][STEPS][TILES][4];
    GroupValues values[TILES];
    int accumulate = 0, used = -1;
#if SUM_GROUPS
    float products[TILES][COUNT];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[tile][i] = 0.0f;
    }
#else
    float(&products)[TILES][COUNT] = sums;
#endif
    for (int step = block.first_step; step < block.end_step; ++step, ring.advance()) {
        const int stage = ring.stage;
        give_lead(block, ring, warpgroup);
        mbarrier_wait(block.full(stage), ring.phase);
        const uint8_t* weights =
            block.memory + kWeightStart + stage * kWeightBytes + warpgroup * TILES * kSuperRowBytes;
        const uint64_t inputs = wgmma_descriptor(block.shared + stage * kInputBytes);
#pragma unroll
        for (int part = 0; part < CHUNKS; ++part) {
            LaneCodes<CODE_BITS> codes[TILES];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const uint8_t* bytes = weights + tile * kSuperRowBytes + part * kChunkBytes + warp * (kChunkBytes / 4);
                codes[tile] = load_codes<CODE_BITS>(bytes, lane);
            }
            const int group = GROUP >= 64 * CHUNKS ? 0 : part * kGroupsPerChunk;
            multiply_steps<0>(products, codes, values, fragments, weights, group, place, problem.weights.scale_factor,
                              inputs + part * (TOKENS * 128 / 16), accumulate, [&] {
                                  if (part == 0 && used >= 0) block.release(used);
                              });
            if (SUM_GROUPS && (GROUP == 64 || part == CHUNKS - 1)) {
                add_group(sums, products, weights, group, place, problem.weights.scale_factor);
                accumulate = 0;
            }
        }
        used = stage;
        if (SUM_GROUPS) block.release(stage), used = -1;
    }
    if (SUM_GROUPS) return;
    wgmma_wait<0>();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) wgmma_pin(sums[tile][i]);
    }
    block.release(used);
}

struct Accumulate {
    const BlockPart& block;
    const Problem& problem;
    Ring& ring;
    int warpgroup;

    template <int COUNT>
    __device__ __forceinline__ void operator()(float (&sums)[TILES][COUNT]) const {
        accumulate_tile(block, problem, ring, warpgroup, sums);
    }
};

__device__ __forceinline__ void scale_sums(const Problem& problem, const Place& place, int warpgroup,
                                           float (&sums)[TILES][kAccumulators]) {
    const int row = place.row() + warpgroup * TILES * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const int64_t before = place.expert() * ((problem.extent.rows + 63) / 64);
    const auto factor = [&](int own) { return row_factor(problem.weights, own, problem.extent.rows, before); };
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const float factors[2] = {factor(row + tile * 64), factor(row + tile * 64 + 8)};
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) sums[tile][i] *= factors[i / 2 % 2];
    }
}

// A multiplying warpgroup.
__device__ __forceinline__ void consume(const BlockPart& block, const Problem& problem, int warpgroup) {
    Ring ring;
    float sums[TILES][kAccumulators];
    for (Tiles tiles(problem.extent); tiles.more(); tiles.next()) {
        const Place place = tiles.place(block.sharer);
        await_lead(ring, warpgroup);
        for_tokens<TOKENS>(place.end_token(problem.extent) - place.token(), sums, Accumulate{block, problem, ring, warpgroup});
        if (kScalesSums) scale_sums(problem, place, warpgroup, sums);
        put_out(problem.output, problem.extent, block, sums, warpgroup, place);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS)
    integer_wgmma(const __grid_constant__ TensorMap inputs, const __grid_constant__ Problem problem) {
    begin();
    fill_code_table();
    const BlockPart block = enter_block(dynamic_shared(), problem.extent);
    if (threadIdx.x >= kConsumers) {
        warpgroup_give_registers<kProducerRegisters>();
        fetch_tiles(block, &inputs, problem);
        __syncwarp();
    } else {
        warpgroup_take_registers<kConsumerRegisters>();
        consume(block, problem, threadIdx.x / 128);
    }
    leave_block();
}
