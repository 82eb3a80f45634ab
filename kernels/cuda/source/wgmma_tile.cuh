// What the wgmma kernels share: how a block's tile is cut, its ring of stages in shared memory, and who does what.
//
// They compute Y^T = W X^T. A block multiplies kRows rows of W with TOKENS rows of X, WARPGROUPS * TILES * 64 by TOKENS.
// The blocks of a cluster are SPLIT parts of the columns times MULTICAST neighbours in the rows that share their tokens.
// Before this header come kInputBytes and kWeightBytes of a stage, each a multiple of 16, kExtraBytes that the kernel has
// at kExtraStart for itself, and kFetchers, the number of
// threads that fetch, each the first of a warp of its own: one alone would be slower than the tensor cores.
#pragma once

#include "grouped_tiles.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/grid_dependency.cuh"
#include "types.cuh"
#include "wgmma_macros.cuh"

// The results on their way out: [token][row], rows padded against bank conflicts; float while blocks still add up, else
// some tokens at a time.
constexpr int kPiece = TOKENS % 64 == 0 ? 64 : TOKENS;
constexpr int kOutputStride = TILES * 64 + 8;
constexpr int kPartialStride = kRows + 4;
constexpr int kOutputBytes = SPLIT > 1 ? TOKENS * kPartialStride * 4 : WARPGROUPS * kPiece * kOutputStride * 2;

constexpr int kWeightStart = STAGES * kInputBytes;
constexpr int kStagesEnd = kWeightStart + STAGES * kWeightBytes;
constexpr int kOutputStart = PERSISTENT ? (kStagesEnd + 127) / 128 * 128 : 0;
constexpr int kPayload = kOutputStart + kOutputBytes > kStagesEnd ? kOutputStart + kOutputBytes : kStagesEnd;

// What the other parts of the columns send: each their sums of this block's share of the tokens.
constexpr int kShareTokens = TOKENS / SPLIT, kShareBytes = kShareTokens * kPartialStride * 4;
constexpr int kReceivedStart = (kPayload + 127) / 128 * 128;
constexpr int kReceivedEnd = kReceivedStart + (SPLIT - 1) * kShareBytes;

constexpr int kExtraStart = (kReceivedEnd + 15) / 16 * 16;
constexpr int kBarrierStart = (kExtraStart + kExtraBytes + 7) / 8 * 8;
constexpr int kReceivedBarrier = kBarrierStart + STAGES * 16;
constexpr int kSharedBytes = kReceivedBarrier + 16 + 1024;  // the start is moved to a multiple of 1024

static_assert(kSharedBytes <= 227 * 1024 / BLOCKS - (BLOCKS > 1 ? 1024 : 0), "more shared memory than there is");

struct Extent {
    int rows, tokens, steps;  // steps: stages that the columns fill
    int row_tiles, token_tiles;
    int first_row_tile;  // those before are multiplied by another launch
#if GROUPED
    GroupTiles groups;  // in place of token_tiles; rows are those of one expert
#endif

    __device__ __forceinline__ int num_token_tiles() const {
#if GROUPED
        return groups.size();
#else
        return token_tiles;
#endif
    }
};

// Which stage comes next, and in which phase its barriers are.
struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    bool is_first_round = true;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1, is_first_round = false;
    }
};

struct Place {
    int row_tile;  // of the expert
#if GROUPED
    GroupTile tile;
    __device__ __forceinline__ Place(int row_tile, int token_tile, const Extent& extent)
        : row_tile(row_tile), tile(extent.groups.tile(token_tile)) {}
    __device__ __forceinline__ int token() const { return tile.first; }
    __device__ __forceinline__ int end_token(const Extent&) const { return tile.end; }
    __device__ __forceinline__ int line() const { return tile.line; }
    __device__ __forceinline__ int64_t expert() const { return tile.expert; }
#else
    int token_tile;
    __device__ __forceinline__ Place(int row_tile, int token_tile, const Extent&)
        : row_tile(row_tile), token_tile(token_tile) {}
    __device__ __forceinline__ int token() const { return token_tile * TOKENS; }
    __device__ __forceinline__ int end_token(const Extent& extent) const { return extent.tokens; }
    __device__ __forceinline__ int line() const { return token(); }
    __device__ __forceinline__ int64_t expert() const { return 0; }
#endif
    __device__ __forceinline__ int row() const { return row_tile * kRows; }
};

struct BlockPart {
    uint32_t shared;  // its address, a multiple of 1024
    uint8_t* memory;
    uint32_t sharer, split;  // its part in the cluster
    int first_step, end_step;

    __device__ __forceinline__ uint32_t full(int stage) const { return shared + kBarrierStart + stage * 16; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8; }

    // A multiplying warp is done with a stage; every block that writes into it must know.
    __device__ __forceinline__ void release(int stage) const {
        if (threadIdx.x % 32 != 0) return;
        if constexpr (MULTICAST == 1) {
            mbarrier_arrive(empty(stage));
        } else {
#pragma unroll
            for (int i = 0; i < MULTICAST; ++i) mbarrier_arrive_remote(empty(stage), split * MULTICAST + i);
        }
    }
};

// Two warpgroups that store at the same time leave the tensor cores idle. So the second starts LEAD steps behind the first;
// as the tensor cores serve both alike, it stays behind. Before each tile:
__device__ __forceinline__ void await_lead(const Ring& ring, int warpgroup) {
    if (LEAD > 0 && warpgroup == 1 && ring.is_first_round && ring.stage == 0) named_barrier_sync(14, kConsumers);
}

// Before each step:
__device__ __forceinline__ void give_lead(const BlockPart& block, const Ring& ring, int warpgroup) {
    const int steps = block.end_step - block.first_step, lead = LEAD < steps ? LEAD : steps - 1;
    if (LEAD > 0 && warpgroup == 0 && ring.is_first_round && ring.stage == lead) named_barrier_arrive(14, kConsumers);
}

// The tiles of a cluster, one after another: groups of token tiles, in them all row tiles, in them the group's tokens.
struct Tiles {
    const Extent& extent;
    int clusters_of_rows, token_tiles, index, stride;

    __device__ __forceinline__ explicit Tiles(const Extent& extent)
        : extent(extent),
          clusters_of_rows((extent.row_tiles + MULTICAST - 1) / MULTICAST),
          token_tiles(extent.num_token_tiles()),
          index(blockIdx.x / kCluster),
          stride(PERSISTENT ? gridDim.x / kCluster : 1 << 30) {}

    __device__ __forceinline__ bool more() const { return index < clusters_of_rows * token_tiles; }
    __device__ __forceinline__ void next() { index += stride; }
    __device__ __forceinline__ Place place(uint32_t sharer) const {
        const int size = clusters_of_rows * TOKEN_GROUP, group = index / size, rest = index % size;
        const int left = token_tiles - group * TOKEN_GROUP, width = left < TOKEN_GROUP ? left : TOKEN_GROUP;
        const int row_tile = extent.first_row_tile + rest / width * MULTICAST + static_cast<int>(sharer);
        return Place(row_tile, group * TOKEN_GROUP + rest % width, extent);
    }
};

// Of the widths of a product that there are instructions for, the next below; 0 if that is not worth its code.
__device__ constexpr int narrower(int width) {
    if (!GROUPED || TOKENS < 64 || width <= TOKENS / 4) return 0;
    return TOKENS >= 128 && width > TOKENS / 2 ? width - TOKENS / 4 : width / 2;
}

// `accumulate` makes the sums of as many of a tile's first tokens as cover `tokens`. An expert's tile may hold far fewer
// tokens than it has room for; all others take the whole width.
template <int WIDTH, typename Accumulate>
__device__ __forceinline__ void for_tokens(int tokens, float (&sums)[TILES][kAccumulators], const Accumulate& accumulate) {
    constexpr int kCount = WIDTH / 2, kNarrower = narrower(WIDTH);
    if constexpr (kNarrower > 0) {
        if (tokens <= kNarrower) return for_tokens<kNarrower>(tokens, sums, accumulate);
    }
    if constexpr (WIDTH == TOKENS) {
        accumulate(sums);
    } else {
        float some[TILES][kCount];
        accumulate(some);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < kAccumulators; ++i) sums[tile][i] = i < kCount ? some[tile][i] : 0.0f;
        }
    }
}

// The first thing that a kernel does.
__device__ __forceinline__ void begin() {
#if GROUPED
    enter_group();
#else
    grid_dependency_launch();
#endif
}

// Sets up a block: its barriers, and its part of the work.
__device__ __forceinline__ BlockPart enter_block(uint8_t* memory, const Extent& extent) {
    memory += (1024 - shared_address(memory) % 1024) % 1024;
    const uint32_t rank = kCluster > 1 ? cluster_rank() : 0, split = rank / MULTICAST;
    const BlockPart block{shared_address(memory),
                      memory,
                      rank % MULTICAST,
                      split,
                      extent.steps * static_cast<int>(split) / SPLIT,
                      extent.steps * static_cast<int>(split + 1) / SPLIT};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(block.full(stage), kFetchers);
            mbarrier_init(block.empty(stage), WARPGROUPS * 4 * MULTICAST);
        }
        if (SPLIT > 1) {
            mbarrier_init(block.shared + kReceivedBarrier, 1);
            mbarrier_arrive_expect(block.shared + kReceivedBarrier, (SPLIT - 1) * kShareBytes);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (kCluster > 1) cluster_arrive_relaxed(), cluster_wait();
    return block;
}

// Every thread, at the end: other blocks may still read this one's memory or arrive at its barriers.
__device__ __forceinline__ void leave_block() {
    if (kCluster > 1) cluster_arrive_relaxed(), cluster_wait();
}

// The loop of a thread that fetches: `fetch(stage, place, step)` arrives once at the stage's barrier, with its bytes.
template <typename Fetch>
__device__ __forceinline__ void produce(const BlockPart& block, Tiles tiles, const Fetch& fetch) {
    Ring ring;
#pragma unroll 1
    for (; tiles.more(); tiles.next()) {
        const Place place = tiles.place(block.sharer);
#pragma unroll 1
        for (int step = block.first_step; step < block.end_step; ++step, ring.advance()) {
            mbarrier_wait(block.empty(ring.stage), ring.phase ^ 1);
            fetch(ring.stage, place, step);
        }
    }
}
