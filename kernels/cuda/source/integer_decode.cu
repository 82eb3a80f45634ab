// y = x W^T + bias for a few tokens and an integer weight: every byte of the weight is read once, at the speed of memory.
//
// The weight is the A operand of mma.sync m16n8k16 and the tokens are its 8 columns, so that one conversion of a code
// serves all tokens. A cluster of CLUSTER blocks owns super rows of 64 outputs; its blocks split the columns, WARP_COLUMNS
// warps of a block split them further, and WARP_ROWS super rows are worked on at a time. Each warp streams its own part
// through its own ring of shared memory, filled by the bulk copy engine: no block-wide barrier while streaming. The first
// STAGES loads of every warp are issued before waiting for the previous kernel (the weight does not depend on it), and two
// blocks fit a multiprocessor, so that one kernel fills its rings while the one before it ends.
//
// Sums are made in one fixed order, without atomics: each scale group in the tensor core's float32 accumulators, groups of
// a warp one after the other, then warps, then blocks (through distributed shared memory).
#include "integer_decode_load.cuh"
#include "integer_decode_multiply.cuh"
#include "integer_decode_sum.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"
#if __CUDA_ARCH__ >= 900
#include "ptx/cluster.cuh"
#endif

// x: [num_tokens, IN_FEATURES], y: [num_tokens, OUT_FEATURES], num_tokens <= kMaxTokens. With GROUPED, num_tokens comes
// from the tile of each row of blocks; x is in the tiles' order, or `sources` names the row of x for each of its places.
extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_MULTIPROCESSOR)
    integer_decode(const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros, const Element* x,
                   const int32_t* columns, const float* bias, Element* y, int num_tokens
#if EXTRAS
                   ,
                   const uint8_t* supers, float factor
#endif
#if GROUPED
                   ,
                   const GroupTiles groups, const int32_t* sources
#endif
    ) {
    uint8_t* shared = dynamic_shared();
#if GROUPED
    enter_group();
    const int num_groups = groups.size();
    const GroupTile group = groups.tile(blockIdx.y);
    if (blockIdx.y >= num_groups) return;
    const Weight weight = Weight{codes, scales, zeros, nullptr, 1.0f}.of(group.expert);
    const Inputs inputs = sources == nullptr ? Inputs{x + static_cast<int64_t>(group.first) * IN_FEATURES, nullptr}
                                             : Inputs{x, sources + group.first};
    num_tokens = group.end - group.first;
    if (HAS_COLUMNS) columns += static_cast<int64_t>(group.expert) * PADDED_COLUMNS;
    if (HAS_BIAS) bias += static_cast<int64_t>(group.expert) * OUT_FEATURES;
    y += static_cast<int64_t>(group.first) * OUT_FEATURES;
#else
#if EXTRAS
    const Weight weight{codes, scales, zeros, supers, factor};
#else
    const Weight weight{codes, scales, zeros, nullptr, 1.0f};
#endif
    const Inputs inputs{x};
#endif
    // From a shuffle, so that the compiler sees one value a warp, and bulk copies need no loop over the lanes.
    const int warp = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
    const int row_part = warp / WARP_COLUMNS, column_part = warp % WARP_COLUMNS;
#if __CUDA_ARCH__ >= 900
    const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0;
#else
    const int rank = 0;
#endif
    const int cluster = blockIdx.x / CLUSTER;
    if (!GROUPED) grid_dependency_launch();
    if (cluster >= NUM_CLUSTERS) {  // only keeps other blocks of this kernel and the next off a multiprocessor
        grid_dependency_wait();
        return;
    }
    const int split = rank * WARP_COLUMNS + column_part;
    const int first_unit = split_start(split), num_units = split_start(split + 1) - first_unit;
    uint8_t* ring = shared + warp * STAGES * kStageBytes;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + kBarrierOffset) + warp * STAGES;

#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        for (int stage = 0; stage < STAGES; ++stage) mbarrier_init(shared_address(barriers + stage), 1);
        if (warp == 0) {
            for (int i = kReceivedBarrier; i < kReceivedBarrier + 2; ++i) {
                mbarrier_init(shared_address(shared + kBarrierOffset) + i * 8, 1);
            }
        }
        if (BULK_INPUT && row_part == 0) {
            mbarrier_init(shared_address(shared + kBarrierOffset) + (kInputBarrier + column_part) * 8, 1);
        }
        mbarrier_init_fence();
    }
    __syncwarp();
    if (CLUSTER > 1) cluster_arrive_relaxed();
#endif
    Cursor next{0, 0};
    auto load_next = [&](int stage) {
        const int part = part_of(cluster, next.pass, row_part);
        if (next.pass < kPasses && part < kParts && num_units > 0) {
            load_unit(ring + stage * kStageBytes, barriers + stage, weight, part, first_unit + next.unit, lane);
            next.advance(num_units);
        }
#if __CUDA_ARCH__ < 900
        copy_async_commit();
#endif
    };
    for (int stage = 0; stage < EARLY_STAGES; ++stage) load_next(stage);
    fill_code_table();
#if BULK_INPUT
    const uint32_t input_barrier = shared_address(shared + kBarrierOffset) + (kInputBarrier + column_part) * 8;
    const int first_token = cluster % num_tokens;
    __syncthreads();  // the barriers of x are there
#endif
    grid_dependency_wait();
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) cluster_wait();  // the other blocks' shared memory can be written from here on
#endif

    uint8_t* input = shared + kInputOffset;
#if BULK_INPUT
    if (row_part == 0) {
        request_input(input + column_part * kSegment * 2, x + first_unit * kUnitColumns, num_tokens, first_token, num_units,
                      input_barrier, lane);
    }
    for (int early = EARLY_STAGES; early < STAGES; ++early) load_next(early);
    mbarrier_wait(input_barrier, 0);
#endif
    float* partials = reinterpret_cast<float*>(shared + (kPartialsInRing ? 0 : kRingBytes));
    int stage = 0, parity = 0;
    for (int pass = 0; pass < kPasses; ++pass) {
        const int part = part_of(cluster, pass, row_part);
        Sums sums = {};
        for (int phase = 0; phase < PHASES; ++phase) {
            if (!BULK_INPUT && (PHASES > 1 || pass == 0)) {
                if (PHASES > 1 && pass + phase > 0) __syncthreads();
                load_input(input, inputs, columns, num_tokens, rank, phase, cluster);
                __syncthreads();
                if (pass + phase == 0) {
                    for (int early = EARLY_STAGES; early < STAGES; ++early) load_next(early);
                }
            }
            const int count = min(kPhaseUnits, num_units - phase * kPhaseUnits);
            for (int unit = 0; unit < count && part < kParts; ++unit) {
#if __CUDA_ARCH__ >= 900
                mbarrier_wait(shared_address(barriers + stage), parity);
#else
                copy_async_wait<STAGES - 1>();
                __syncwarp();
#endif
                multiply_unit(ring + stage * kStageBytes, input + (column_part * kSegment + unit * kUnitColumns) * 2,
                              num_tokens, lane, part, sums);
                __syncwarp();
                load_next(stage);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        if (kPartialsInRing) __syncthreads();  // all warps have read their rings
        store_partials(partials + warp * kMaxTokens * kPartialStride, sums, num_tokens, lane);
        finish_pass(shared, partials, pass, cluster, rank, num_tokens, weight, bias, y);
    }
}
