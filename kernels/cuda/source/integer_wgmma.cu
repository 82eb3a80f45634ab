// Integer weights times many tokens on Hopper: Y^T = W X^T by wgmma, with W as the register operand.
//
// One warp fetches: codes and scales as contiguous bytes, inputs as swizzled tiles by a tensor map, several stages ahead.
// Each other warpgroup turns the codes of its 64-row tiles into fragments, in the very registers that wgmma reads, while
// its previous products run; the packed layout needs no shuffle for that. The weights do not depend on the kernel in
// front, so the first stages' codes are fetched before waiting for it.
//
// Few tokens give few tiles: then the columns of a tile are split among the blocks of a cluster, which add up through
// distributed shared memory in a fixed order. Many tokens: blocks stay and take tile after tile, and pairs of blocks
// fetch each input once for both (MULTICAST).
#include "integer_wgmma_output.cuh"
#include "integer_wgmma_shape.cuh"
#include "integer_wgmma_weights.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/wgmma.cuh"

constexpr int kTokenGroup = 8;  // tiles of tokens that are worked on side by side, so that L2 holds their inputs

// Which stage comes next, and in which phase its barriers are.
struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

struct Place {
    int row_tile, token_tile;
};

struct Block {
    const Problem& problem;
    uint32_t shared;  // its address, a multiple of 1024
    uint8_t* memory;
    uint32_t sharer, split;  // its part in the cluster
    int first_chunk, end_chunk;

    __device__ __forceinline__ uint32_t full(int stage) const { return shared + kBarrierStart + stage * 16; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8; }

    // Tile `index` of the cluster: groups of token tiles, in them all row tiles, in them the group's token tiles.
    __device__ __forceinline__ Place place(int index) const {
        const int rows = (problem.row_tiles + MULTICAST - 1) / MULTICAST;
        const int group = index / (rows * kTokenGroup), rest = index % (rows * kTokenGroup);
        const int left = problem.token_tiles - group * kTokenGroup;
        const int width = left < kTokenGroup ? left : kTokenGroup;
        return {rest / width * MULTICAST + static_cast<int>(sharer), group * kTokenGroup + rest % width};
    }
    __device__ __forceinline__ int num_tiles() const {
        return (problem.row_tiles + MULTICAST - 1) / MULTICAST * problem.token_tiles;
    }
};

// Codes, scales, zero points and offsets of a stage; arms the stage's barrier for all that comes.
__device__ __forceinline__ void fetch_weights(const Block& block, int stage, int row_tile, int chunk, uint64_t cache) {
    const Problem& problem = block.problem;
    const int total = (problem.rows + 63) / 64, left = total - row_tile * kSuperRows;
    const int super_rows = left < 0 ? 0 : left < kSuperRows ? left : kSuperRows;
    const uint32_t barrier = block.full(stage);
    mbarrier_arrive_expect(barrier, kInputBytes + super_rows * kSuperRowBytes);
    uint32_t target = block.shared + kWeightStart + stage * kWeightBytes;
#pragma unroll 1
    for (int i = 0; i < super_rows; ++i, target += kSuperRowBytes) {
        const int64_t row = row_tile * kSuperRows + i;
        bulk_load(target, problem.codes + (row * problem.chunks + chunk) * kChunkBytes, kCodeBytes, barrier, cache);
        if (GROUP == 0) continue;
        const int64_t line = row * problem.groups + (GROUP > 64 ? chunk * 64 / (GROUP ? GROUP : 1) : chunk * kGroupsPerChunk);
        bulk_load(target + kCodeBytes, problem.scales + line * 64 * kScaleBytes, kScaleStage, barrier, cache);
        if (ZEROS == 1) {
            bulk_load(target + kCodeBytes + kScaleStage, problem.zeros + line * 64, kZeroStage, barrier, cache);
        }
        if (ZEROS == 2) {
            bulk_load(target + kCodeBytes + kScaleStage, problem.offsets + line * 64 * kScaleBytes, kOffsetStage,
                      barrier, cache);
        }
    }
}

__device__ __forceinline__ void fetch_inputs(const Block& block, const TensorMap* map, int stage, int token_tile,
                                             int chunk) {
    constexpr int kPart = TOKENS / MULTICAST;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const uint32_t target = block.shared + stage * kInputBytes + i * TOKENS * 128 + block.sharer * kPart * 128;
        const int token = token_tile * TOKENS + block.sharer * kPart;
        if (MULTICAST == 1) {
            tensor_load(target, map, (chunk + i) * 64, token, block.full(stage), kCacheEvictLast);
        } else {
            const uint16_t blocks = ((1 << MULTICAST) - 1) << (block.split * MULTICAST);
            tensor_load_multicast(target, map, (chunk + i) * 64, token, block.full(stage), blocks, kCacheEvictLast);
        }
    }
}

// The fetching thread.
__device__ __forceinline__ void produce(const Block& block, const TensorMap* map, int first_tile, int tile_stride) {
    const int num_tiles = block.num_tiles();
    const uint64_t cache = block.problem.token_tiles == 1 ? kCacheEvictFirst : kCacheEvictNormal;
    const int steps = (block.end_chunk - block.first_chunk) / CHUNKS;
    const int ahead = steps < STAGES ? steps : STAGES;
    Ring ring;
#pragma unroll 1
    for (int tile = first_tile; tile < num_tiles; tile += tile_stride) {
        const Place place = block.place(tile);
        int chunk = block.first_chunk;
        if (tile == first_tile) {
#pragma unroll 1
            for (int i = 0; i < ahead; ++i) fetch_weights(block, i, place.row_tile, chunk + i * CHUNKS, cache);
            grid_dependency_wait();
#pragma unroll 1
            for (int i = 0; i < ahead; ++i, chunk += CHUNKS) {
                fetch_inputs(block, map, i, place.token_tile, chunk);
                ring.advance();
            }
        }
#pragma unroll 1
        for (; chunk < block.end_chunk; chunk += CHUNKS, ring.advance()) {
            mbarrier_wait(block.empty(ring.stage), ring.phase ^ 1);
            fetch_weights(block, ring.stage, place.row_tile, chunk, cache);
            fetch_inputs(block, map, ring.stage, place.token_tile, chunk);
        }
    }
}

__device__ __forceinline__ void release(const Block& block, int stage) {
    if (threadIdx.x % 32 != 0) return;
    if constexpr (MULTICAST == 1) {
        mbarrier_arrive(block.empty(stage));
    } else {
#pragma unroll
        for (int i = 0; i < MULTICAST; ++i) mbarrier_arrive_remote(block.empty(stage), block.split * MULTICAST + i);
    }
}

__device__ __forceinline__ void multiply(float (&sums)[kAccumulators], const uint32_t (&fragment)[4],
                                         uint64_t descriptor, int accumulate) {
    if (kIsBf16) {
        wgmma_bf16(sums, fragment, descriptor, accumulate);
    } else {
        wgmma_f16(sums, fragment, descriptor, accumulate);
    }
}

template <int STEP>
__device__ __forceinline__ void make_fragment(const LaneCodes<CODE_BITS>& codes, const GroupValues& values,
                                              uint32_t (&fragment)[4]) {
    dequantize<CODE_BITS, kIsBf16, ZEROS == 0, STEP>(codes, values.zeros, fragment);
    values.apply(fragment);
}

// One chunk of 64 columns: four steps, STEPS at a time; while some are converted, those before are multiplied.
template <int FIRST, typename AfterFirst>
__device__ __forceinline__ void multiply_steps(float (&sums)[TILES][kAccumulators], const LaneCodes<CODE_BITS> (&codes)[TILES],
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

// A warpgroup's tiles over the block's columns.
__device__ __forceinline__ void accumulate_tile(const Block& block, Ring& ring, int warpgroup,
                                                float (&sums)[TILES][kAccumulators]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int place = lane / 4 * 8 + warp * 2;
    uint32_t fragments[2][STEPS][TILES][4];
    GroupValues values[TILES];
    int accumulate = 0, used = -1;
    for (int chunk = block.first_chunk; chunk < block.end_chunk; chunk += CHUNKS, ring.advance()) {
        const int stage = ring.stage;
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
            multiply_steps<0>(sums, codes, values, fragments, weights, group, place, block.problem.scale_factor,
                              inputs + part * (TOKENS * 128 / 16), accumulate, [&] {
                                  if (part == 0 && used >= 0) release(block, used);
                              });
        }
        used = stage;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) wgmma_pin(sums[tile][i]);
    }
    release(block, used);
}

// A multiplying warpgroup.
__device__ __forceinline__ void consume(const Block& block, int warpgroup, int first_tile, int tile_stride) {
    const int num_tiles = block.num_tiles();
    Ring ring;
    float sums[TILES][kAccumulators];
    for (int tile = first_tile; tile < num_tiles; tile += tile_stride) {
        const Place place = block.place(tile);
        accumulate_tile(block, ring, warpgroup, sums);
        const int first_row = place.row_tile * kRows, first_token = place.token_tile * TOKENS;
        const int own_row = first_row + warpgroup * TILES * 64;
        if (!PERSISTENT) named_barrier_sync(15, kConsumers);  // all have read the stages that the output overwrites
        if constexpr (SPLIT == 1) {
            uint8_t* staging = block.memory + kOutputStart + warpgroup * TOKENS * kOutputStride * 2;
            store_tile(block.problem, sums, staging, warpgroup, own_row, first_token);
        } else {
            float* staging = reinterpret_cast<float*>(block.memory + kOutputStart);
            stage_partial(block.problem, sums, staging, warpgroup, own_row);
            cluster_arrive();
            cluster_wait();
            store_sums(block.problem, staging, block.split, block.sharer, first_row, first_token);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS)
    integer_wgmma(const __grid_constant__ TensorMap inputs, const __grid_constant__ Problem problem) {
    uint8_t* memory = dynamic_shared();
    memory += (1024 - shared_address(memory) % 1024) % 1024;
    const uint32_t rank = kCluster > 1 ? cluster_rank() : 0;
    const uint32_t sharer = rank % MULTICAST, split = rank / MULTICAST;
    const int steps = problem.chunks / CHUNKS;
    const Block block{problem,
                      shared_address(memory),
                      memory,
                      sharer,
                      split,
                      static_cast<int>(steps * split / SPLIT) * CHUNKS,
                      static_cast<int>(steps * (split + 1) / SPLIT) * CHUNKS};
    grid_dependency_launch();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(block.full(stage), 1);
            mbarrier_init(block.empty(stage), WARPGROUPS * 4 * MULTICAST);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (kCluster > 1) cluster_arrive(), cluster_wait();

    const int first_tile = blockIdx.x / kCluster;
    const int tile_stride = PERSISTENT ? gridDim.x / kCluster : 1 << 30;
    if (threadIdx.x >= kConsumers) {
        warpgroup_give_registers<kProducerRegisters>();
        if (threadIdx.x == kConsumers) produce(block, &inputs, first_tile, tile_stride);
        __syncwarp();
        if (SPLIT > 1) cluster_arrive(), cluster_wait();
        if (kCluster > 1) cluster_arrive(), cluster_wait();
    } else {
        warpgroup_take_registers<kConsumerRegisters>();
        consume(block, threadIdx.x / 128, first_tile, tile_stride);
        if (kCluster > 1) cluster_arrive(), cluster_wait();
    }
}
