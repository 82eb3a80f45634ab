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
#include "code_table.cuh"
#include "grouped_tiles.cuh"
#include "integer_dequantize.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/warp_matrix.cuh"
#include "stored_scales.cuh"
#include "types.cuh"
#if __CUDA_ARCH__ >= 900
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/remote_store.cuh"
#else
#include "ptx/async_copy.cuh"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef CODE_BITS
#define CODE_BITS 4
#endif
#ifndef GROUP_SIZE  // packed columns that share a scale
#define GROUP_SIZE 128
#endif
#ifndef ZERO_KIND  // 0: symmetric, 1: zero points, 2: offsets
#define ZERO_KIND 0
#endif
#ifndef BF16_INPUTS  // x and y: 1 bfloat16, 0 float16
#define BF16_INPUTS 1
#endif
#ifndef SCALE_TYPE  // of scales and offsets, as stored_scales.cuh has them
#define SCALE_TYPE 1
#endif
#ifndef EXTRAS  // the kernel also takes supers, and a factor of the whole weight
#define EXTRAS 0
#endif
#ifndef OUT_FEATURES
#define OUT_FEATURES 4096
#endif
#ifndef IN_FEATURES
#define IN_FEATURES 4096
#endif
#ifndef PADDED_COLUMNS
#define PADDED_COLUMNS 4096
#endif
#ifndef HAS_COLUMNS  // x is gathered by the packed columns' inputs
#define HAS_COLUMNS 0
#endif
#ifndef HAS_BIAS
#define HAS_BIAS 0
#endif
#ifndef TOKEN_TILES  // of 8 tokens
#define TOKEN_TILES 1
#endif
#ifndef NUM_CLUSTERS
#define NUM_CLUSTERS 32
#endif
#ifndef CLUSTER
#if __CUDA_ARCH__ >= 900
#define CLUSTER 4
#else
#define CLUSTER 1
#endif
#endif
#ifndef WARP_ROWS
#define WARP_ROWS 2
#endif
#ifndef WARP_COLUMNS
#define WARP_COLUMNS 4
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef EARLY_STAGES  // loaded before this kernel waits for the one in front of it; the others after x
#define EARLY_STAGES STAGES
#endif
#ifndef UNIT_CHUNKS  // chunks of 64 columns in a stage
#define UNIT_CHUNKS 2
#endif
#ifndef PART_TILES  // tiles of 16 rows that a warp works on: 4 (a super row) or 2
#define PART_TILES 4
#endif
#ifndef BULK_INPUT  // x comes by the bulk copy engine (sm_90), and more of the weight is asked for before it is there
#define BULK_INPUT 0
#endif
#ifndef PHASES  // parts in which a block's slice of x is held
#define PHASES 1
#endif
#ifndef BLOCKS_PER_MULTIPROCESSOR
#define BLOCKS_PER_MULTIPROCESSOR 2
#endif

constexpr bool kBf16 = BF16_INPUTS != 0;
constexpr int kWarps = WARP_ROWS * WARP_COLUMNS, kThreads = kWarps * 32;
constexpr int kParts = (OUT_FEATURES + 63) / 64 * (4 / PART_TILES), kPartRows = PART_TILES * 16;
constexpr int kChunkBytes = 64 * 8 * CODE_BITS, kTileBytes = kChunkBytes / 4;
constexpr int kUnitColumns = UNIT_CHUNKS * 64;
constexpr int kUnits = PADDED_COLUMNS / kUnitColumns;
constexpr int kSplits = CLUSTER * WARP_COLUMNS;
constexpr int kMaxUnits = (kUnits + kSplits - 1) / kSplits;  // of a warp in a super row
constexpr int kTurns = (kParts + NUM_CLUSTERS - 1) / NUM_CLUSTERS;
constexpr int kPasses = (kTurns + WARP_ROWS - 1) / WARP_ROWS;

// A weight with one scale a row and no zero points is scaled at the end.
constexpr bool kRowScales = GROUP_SIZE == PADDED_COLUMNS && ZERO_KIND == 0;
constexpr int kGroups = (PADDED_COLUMNS + GROUP_SIZE - 1) / GROUP_SIZE;
constexpr int kUnitGroups = GROUP_SIZE < kUnitColumns ? kUnitColumns / GROUP_SIZE : 1;
constexpr int kGroupSteps = (GROUP_SIZE < kUnitColumns ? GROUP_SIZE : kUnitColumns) / 16;
constexpr int kScaleSize = stored_bytes(SCALE_TYPE);
constexpr int kPieceBytes = PART_TILES * kTileBytes;  // of a chunk
constexpr int kCodeBytes = UNIT_CHUNKS * kPieceBytes;
constexpr int kScaleBytes = kRowScales ? 0 : kUnitGroups * 64 * kScaleSize;
constexpr int kZeroBytes = ZERO_KIND == 0 ? 0 : kUnitGroups * 64 * (ZERO_KIND == 1 ? 1 : kScaleSize);
constexpr bool kSupers = SCALE_TYPE == kScaleSuper;  // fp16 numbers that 256 columns share: of scales, then of offsets
constexpr int kSuperBytes = kSupers ? (ZERO_KIND == 2 ? 2 : 1) * 64 * 2 : 0;
constexpr int kStageBytes = kCodeBytes + kScaleBytes + kZeroBytes + kSuperBytes;

// Shared memory: rings | partial sums of warps | partial sums of blocks | x | barriers.
constexpr int kMaxTokens = TOKEN_TILES * 8;
constexpr int kRingBytes = kWarps * STAGES * kStageBytes;
constexpr int kPartialStride = kPartRows + 4;  // floats between tokens of a warp's partial sums: no bank conflicts
constexpr int kPartialBytes = kWarps * kMaxTokens * kPartialStride * 4;
constexpr bool kPartialsInRing = kPasses == 1 && kPartialBytes <= kRingBytes;
constexpr int kOwnRows = WARP_ROWS * kPartRows / CLUSTER;
constexpr int kReceivedFloats = CLUSTER > 1 ? kMaxTokens * WARP_ROWS * kPartRows : 0;  // of all blocks
constexpr int kReceivedBuffers = kPasses > 1 ? 2 : 1;
constexpr int kPhaseUnits = (kMaxUnits + PHASES - 1) / PHASES;
constexpr int kSegment = kPhaseUnits * kUnitColumns;  // columns of x that a warp needs in a phase
constexpr int kInputStride = WARP_COLUMNS * kSegment * 2 + 16;  // bytes
constexpr int kReceivedOffset = kRingBytes + (kPartialsInRing ? 0 : kPartialBytes);
constexpr int kBarrierOffset = kReceivedOffset + kReceivedFloats * kReceivedBuffers * 4;
constexpr int kReceivedBarrier = kWarps * STAGES;
constexpr int kInputBarrier = kReceivedBarrier + 2;  // one for each part of the columns
constexpr int kInputOffset = kBarrierOffset + ((kInputBarrier + WARP_COLUMNS) * 8 + 127) / 128 * 128;
#ifdef INPUT_OFFSET  // what the host takes them for
static_assert(INPUT_OFFSET == kInputOffset && INPUT_STRIDE == kInputStride, "host and kernel agree on shared memory");
#endif

static_assert(CODE_BITS == 2 || CODE_BITS == 3 || CODE_BITS == 4 || CODE_BITS == 5 || CODE_BITS == 6 || CODE_BITS == 8,
              "bits of a stored code");
static_assert(PADDED_COLUMNS % 128 == 0 && IN_FEATURES <= PADDED_COLUMNS * (HAS_COLUMNS ? 16 : 1), "padded columns");
static_assert(GROUP_SIZE % 16 == 0 && (GROUP_SIZE % kUnitColumns == 0 || kUnitColumns % GROUP_SIZE == 0),
              "groups and stages must fit");
static_assert(PADDED_COLUMNS % kUnitColumns == 0, "whole stages");
static_assert(!kSupers || (EXTRAS && 256 % kUnitColumns == 0 && PADDED_COLUMNS % 256 == 0), "a stage has one line of supers");
static_assert(EARLY_STAGES >= 1 && EARLY_STAGES <= STAGES, "some stages are loaded early");
static_assert(PART_TILES == 2 || PART_TILES == 4, "tiles of a warp");
static_assert(!BULK_INPUT || (!HAS_COLUMNS && !GROUPED && IN_FEATURES == PADDED_COLUMNS && PHASES == 1), "x as it is");
static_assert(WARP_ROWS * kPartRows % CLUSTER == 0 && kOwnRows % 4 == 0, "each block of a cluster owns as many rows");

using Element = uint16_t;

__device__ __forceinline__ int split_start(int split) { return static_cast<int>(static_cast<int64_t>(split) * kUnits / kSplits); }

// The rows that a warp works on in a pass, in units of kPartRows; kParts or more: none.
__device__ __forceinline__ int part_of(int cluster, int pass, int row_part) {
    return (pass * WARP_ROWS + row_part) * NUM_CLUSTERS + cluster;
}

__device__ __forceinline__ float to_float(Element value) {
    if (kBf16) return __uint_as_float(static_cast<uint32_t>(value) << 16);
    return __half2float(__ushort_as_half(value));
}

__device__ __forceinline__ Element from_float(float value) {
    if (kBf16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
    return __half_as_ushort(__float2half_rn(value));
}

struct Weight {
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* zeros;  // zero points or offsets
    const uint8_t* supers;  // [super rows][256 columns][scales, offsets][64]
    float factor;           // of all outputs

    // The weight of an expert; those of all stand one after another.
    __device__ __forceinline__ Weight of(int expert) const {
        const int64_t super_rows = static_cast<int64_t>(expert) * ((OUT_FEATURES + 63) / 64), values = super_rows * kGroups * 64;
        return {codes + super_rows * (PADDED_COLUMNS / 64) * kChunkBytes, scales + values * kScaleSize,
                zeros + values * (ZERO_KIND == 1 ? 1 : kScaleSize), nullptr, factor};
    }
};

// Rows of x; with GROUPED those that `sources` names, if there are any.
struct Inputs {
    const Element* x;
#if GROUPED
    const int32_t* sources;
    __device__ __forceinline__ const Element* row(int token) const {
        return x + static_cast<int64_t>(sources == nullptr ? token : sources[token]) * IN_FEATURES;
    }
#else
    __device__ __forceinline__ const Element* row(int token) const { return x + static_cast<int64_t>(token) * IN_FEATURES; }
#endif
};

// Copies one unit's bytes into a slot of a warp's ring; all lanes call it.
__device__ __forceinline__ void load_unit(uint8_t* slot, uint64_t* filled, const Weight& weight, int part, int unit,
                                          int lane) {
    const int super_row = part / (4 / PART_TILES), piece = part % (4 / PART_TILES);
    const uint8_t* codes = weight.codes + (static_cast<int64_t>(super_row) * kUnits + unit) * (UNIT_CHUNKS * kChunkBytes) +
                           piece * kPieceBytes;
    const int64_t group = static_cast<int64_t>(super_row) * kGroups + unit * kUnitColumns / GROUP_SIZE;
    const uint8_t* scales = weight.scales + group * (64 * kScaleSize);
    const uint8_t* zeros = weight.zeros + group * (64 * (ZERO_KIND == 1 ? 1 : kScaleSize));
    const int64_t super = static_cast<int64_t>(super_row) * (PADDED_COLUMNS / 256) + unit * kUnitColumns / 256;
    const uint8_t* supers = weight.supers + super * kSuperBytes;
#if __CUDA_ARCH__ >= 900
    if (lane != 0) return;
    const uint32_t target = shared_address(slot), barrier = shared_address(filled);
    mbarrier_arrive_expect(barrier, kStageBytes);
    if (PART_TILES == 4) {
        bulk_load(target, codes, kCodeBytes, barrier, kCacheEvictFirst);
    } else {
#pragma unroll
        for (int chunk = 0; chunk < UNIT_CHUNKS; ++chunk) {
            bulk_load(target + chunk * kPieceBytes, codes + chunk * kChunkBytes, kPieceBytes, barrier, kCacheEvictFirst);
        }
    }
    if (kScaleBytes) bulk_load(target + kCodeBytes, scales, kScaleBytes, barrier, kCacheEvictFirst);
    if (kZeroBytes) bulk_load(target + kCodeBytes + kScaleBytes, zeros, kZeroBytes, barrier, kCacheEvictFirst);
    if (kSuperBytes) bulk_load(target + kStageBytes - kSuperBytes, supers, kSuperBytes, barrier, kCacheEvictNormal);
#else
    for (int i = lane * 16; i < kStageBytes; i += 32 * 16) {
        const uint8_t* source = i < kCodeBytes                 ? codes + i / kPieceBytes * kChunkBytes + i % kPieceBytes
                                : i < kCodeBytes + kScaleBytes ? scales + (i - kCodeBytes)
                                : i < kStageBytes - kSuperBytes
                                    ? zeros + (i - kCodeBytes - kScaleBytes)
                                    : supers + (i - (kStageBytes - kSuperBytes));
        copy_async<16>(slot + i, source, true);
    }
#endif
}

// Walks a warp's units, super row by super row.
struct Cursor {
    int pass, unit;
    __device__ __forceinline__ void advance(int num_units) {
        if (++unit == num_units) unit = 0, ++pass;
    }
};

// The first column of x that a warp of the block needs in a phase.
__device__ __forceinline__ int segment_start(int rank, int part, int phase) {
    return (split_start(rank * WARP_COLUMNS + part) + phase * kPhaseUnits) * kUnitColumns;
}

// Eight numbers of a row of x, from a packed column on; zeros where there are none.
__device__ __forceinline__ uint4 load_eight(const Element* row, const int32_t* columns, int column) {
    if constexpr (IN_FEATURES % 8 == 0 && !HAS_COLUMNS) {
        return column < IN_FEATURES ? *reinterpret_cast<const uint4*>(row + column) : make_uint4(0, 0, 0, 0);
    } else {
        uint32_t items[8];
#pragma unroll
        for (int item = 0; item < 8; ++item) {
            int source = column + item;
            if (HAS_COLUMNS) source = source < PADDED_COLUMNS ? columns[source] : -1;
            items[item] = source >= 0 && source < IN_FEATURES ? row[source] : 0u;
        }
        return make_uint4(items[0] | items[1] << 16, items[2] | items[3] << 16, items[4] | items[5] << 16,
                          items[6] | items[7] << 16);
    }
}

// One part of the block's slice of x to shared memory, as [tokens][WARP_COLUMNS segments]. Clusters begin at different
// tokens, because all of them read the same lines of L2.
__device__ __forceinline__ void load_input(uint8_t* input, const Inputs& x, const int32_t* columns, int num_tokens,
                                           int rank, int phase, int cluster) {
    constexpr int kVectors = WARP_COLUMNS * kSegment / 8;
    constexpr int kBatch = HAS_COLUMNS || IN_FEATURES % 8 != 0 ? 2 : PHASES > 1 ? 4 : 8;  // loads in flight
    const int first_token = cluster % num_tokens, total = num_tokens * kVectors;
    for (int start = threadIdx.x; start < total; start += kThreads * kBatch) {
        uint4 values[kBatch];
        int targets[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int index = start + i * kThreads;
            if (index >= total) break;
            const int vector = index % kVectors;
            int token = index / kVectors + first_token;
            if (token >= num_tokens) token -= num_tokens;
            const int part = vector / (kSegment / 8), place = vector % (kSegment / 8) * 8;
            targets[i] = token * kInputStride + vector * 16;
            values[i] = load_eight(x.row(token), columns, segment_start(rank, part, phase) + place);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (start + i * kThreads < total) *reinterpret_cast<uint4*>(input + targets[i]) = values[i];
        }
    }
}

#if BULK_INPUT
// The same by the bulk copy engine: a warp asks for the columns of its units, from `x` on, which arrive at `barrier`.
__device__ __forceinline__ void request_input(uint8_t* input, const Element* x, int num_tokens, int first_token,
                                              int num_units, uint32_t barrier, int lane) {
    const int bytes = num_units * kUnitColumns * 2;
    if (lane == 0) mbarrier_arrive_expect(barrier, num_tokens * bytes);
    __syncwarp();
    if (lane >= num_tokens || bytes == 0) return;
    const int token = lane + first_token < num_tokens ? lane + first_token : lane + first_token - num_tokens;
    bulk_load(shared_address(input + token * kInputStride), x + static_cast<int64_t>(token) * IN_FEATURES, bytes, barrier,
              kCacheEvictLast);
}
#endif

// Whether codes become numbers around zero, which offsets then have to undo; minima of super-blocks take codes as they are.
constexpr bool kCentered = ZERO_KIND == 0 || (ZERO_KIND == 2 && !kSupers);

// Products of e2m1 numbers and e4m3 scales are exact in the inputs' type: less work than to scale the products of a group
// where these are of more than one tile of tokens.
#ifndef SCALED_CODES
#define SCALED_CODES (TOKEN_TILES > 1)
#endif
constexpr bool kScaledCodes = SCALE_TYPE == kScaleE4M3 && HAS_CODE_TABLE && !kRowScales && SCALED_CODES;
constexpr bool kScaledSums = !kRowScales && !kScaledCodes;

using Sums = float[PART_TILES][TOKEN_TILES][4];

// Scales and zero points of one group for a lane's rows: row half `i % 2` of tile `i / 2`.
struct Group {
    float scales[PART_TILES * 2];
    float offsets[PART_TILES * 2];
    ZeroPair<CODE_BITS, kBf16> zeros[PART_TILES];
    uint32_t pairs[PART_TILES * 2];  // with kScaledCodes: scales in the inputs' type, each twice
};

// e4m3 scales of the lane's rows, from their bytes.
__device__ __forceinline__ void load_pairs(const uint8_t* line, uint32_t (&pairs)[PART_TILES * 2]) {
    constexpr uint32_t kUnbias = kBf16 ? 0x7B807B80u : 0x5C005C00u, kNegativeZero = 0x80008000u;  // 2^120 or 2^8, twice
#pragma unroll
    for (int tile = 0; tile < PART_TILES; ++tile) {
        const uint32_t word = reinterpret_cast<const uint32_t*>(line)[tile / 2];
        const uint32_t both =
            fused_multiply_add_pair<kBf16>(widen_e4m3_pair<kBf16>(word, tile % 2), kUnbias, kNegativeZero);
        pairs[tile * 2] = __byte_perm(both, 0, 0x1010);
        pairs[tile * 2 + 1] = __byte_perm(both, 0, 0x3232);
    }
}

// Scales (KIND 0) or offsets (1), which begin at `lines`. `first` is the place of the lane's values in a line of 64.
template <int KIND>
__device__ __forceinline__ void load_scales(const uint8_t* slot, const uint8_t* lines, int group, int first,
                                            float (&values)[PART_TILES * 2]) {
    const uint8_t* const line = lines + (group * 64 + first) * kScaleSize;
    if constexpr (kSupers) {
        load_supers(line, slot + kStageBytes - kSuperBytes + (KIND * 64 + first) * 2, values);
    } else {
        load_stored<SCALE_TYPE>(line, values);
    }
}

__device__ __forceinline__ void load_group(const uint8_t* slot, int group, int first, Group& values) {
    if (kRowScales) return;
    if constexpr (kScaledCodes) return load_pairs(slot + kCodeBytes + group * 64 + first, values.pairs);
    load_scales<0>(slot, slot + kCodeBytes, group, first, values.scales);
    const uint8_t* zeros = slot + kCodeBytes + kScaleBytes;
    if (ZERO_KIND == 1) {
#pragma unroll
        for (int pair = 0; pair < PART_TILES / 2; ++pair) {
            const uint32_t bytes = *reinterpret_cast<const uint32_t*>(zeros + group * 64 + first + pair * 4);
#pragma unroll
            for (int i = 0; i < 4; ++i) values.zeros[pair * 2 + i / 2].set(i % 2, bytes >> (i * 8) & 0xFF);
        }
    } else if (ZERO_KIND == 2) {
        load_scales<1>(slot, zeros, group, first, values.offsets);
#pragma unroll
        for (int i = 0; i < PART_TILES * 2; ++i) {
            if (kCentered) values.offsets[i] += values.scales[i] * static_cast<float>(1 << (CODE_BITS - 1));
            if (kSupers) values.offsets[i] = -values.offsets[i];
            if (!kCentered) values.zeros[i / 2].set(i % 2, 0);
        }
    }
}

// What a warp has at hand within a unit.
struct Registers {
    LaneCodes<CODE_BITS> codes[PART_TILES];  // of a chunk, by tile
    uint32_t inputs[TOKEN_TILES][4];     // B fragments of two k16-steps
    float products[PART_TILES][TOKEN_TILES][4];  // of a group, by tile
    float input_sums[TOKEN_TILES][4];    // of x over a group, in every row
    Group group;
};

__device__ __forceinline__ void clear_products(Registers& at) {
#pragma unroll
    for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            at.input_sums[token_tile][i] = 0.0f;
#pragma unroll
            for (int tile = 0; tile < PART_TILES; ++tile) at.products[tile][token_tile][i] = 0.0f;
        }
    }
}

__device__ __forceinline__ void add_products(const Registers& at, Sums& sums) {
#pragma unroll
    for (int tile = 0; tile < PART_TILES; ++tile) {
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& sum = sums[tile][token_tile][i];
                const int row = tile * 2 + i / 2;
                sum += at.group.scales[row] * at.products[tile][token_tile][i];
                if (ZERO_KIND == 2) sum += at.group.offsets[row] * at.input_sums[token_tile][i];
            }
        }
    }
}

// k16-step STEP of a unit and those after it. `input` is this lane's row of its first columns, for ldmatrix.
template <int STEP>
__device__ __forceinline__ void multiply_steps(const uint8_t* slot, const uint8_t* const (&input)[TOKEN_TILES], int lane,
                                               int first, Registers& at, Sums& sums) {
    if constexpr (STEP % 4 == 0) {
#pragma unroll
        for (int tile = 0; tile < PART_TILES; ++tile) {
            at.codes[tile] = load_codes<CODE_BITS>(slot + STEP / 4 * kPieceBytes + tile * kTileBytes, lane);
        }
    }
    if constexpr (STEP % 2 == 0) {
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            load_matrices<false>(at.inputs[token_tile], input[token_tile] + STEP * 32);
        }
    }
    if constexpr (STEP % kGroupSteps == 0) {
        load_group(slot, STEP / kGroupSteps, first, at.group);
        clear_products(at);
    }
#pragma unroll
    for (int tile = 0; tile < PART_TILES; ++tile) {
        uint32_t fragment[4];
#if HAS_CODE_TABLE
        look_up<STEP % 4>(at.codes[tile], fragment);
        if constexpr (kScaledCodes) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                fragment[r] = fused_multiply_add_pair<kBf16>(fragment[r], at.group.pairs[tile * 2 + r % 2], 0x80008000u);
            }
        }
#else
        dequantize<CODE_BITS, kBf16, kCentered, STEP % 4>(at.codes[tile], at.group.zeros[tile], fragment);
#endif
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            float(&target)[4] = kScaledSums ? at.products[tile][token_tile] : sums[tile][token_tile];
            multiply_add<kBf16>(target, fragment, at.inputs[token_tile][STEP % 2 * 2],
                                at.inputs[token_tile][STEP % 2 * 2 + 1]);
        }
    }
    if constexpr (ZERO_KIND == 2) {  // sums of x as a product with ones: in the places where the offsets need them
        constexpr uint32_t kOne = PairConstants<kBf16>::kOne;
        const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            multiply_add<kBf16>(at.input_sums[token_tile], ones, at.inputs[token_tile][STEP % 2 * 2],
                                at.inputs[token_tile][STEP % 2 * 2 + 1]);
        }
    }
    if constexpr ((STEP + 1) % kGroupSteps == 0 && kScaledSums) add_products(at, sums);
    if constexpr (STEP + 1 < UNIT_CHUNKS * 4) multiply_steps<STEP + 1>(slot, input, lane, first, at, sums);
}

// Adds one unit's product to the sums. `input` is the unit's first column of token 0.
__device__ __forceinline__ void multiply_unit(const uint8_t* slot, const uint8_t* input, int num_tokens, int lane,
                                              int part, Sums& sums) {
    const uint8_t* rows[TOKEN_TILES];
#pragma unroll
    for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
        const int token = min(token_tile * 8 + lane % 8, num_tokens - 1);  // what stands in unused columns is dropped
        rows[token_tile] = input + token * kInputStride + lane / 8 * 16;
    }
    Registers at;
    multiply_steps<0>(slot, rows, lane, lane / 4 * 8 + part % (4 / PART_TILES) * (PART_TILES * 2), at, sums);
}

// A warp's sums to shared memory, as [tokens][kPartialStride].
__device__ __forceinline__ void store_partials(float* partials, const Sums& sums, int num_tokens, int lane) {
#pragma unroll
    for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = token_tile * 8 + lane % 4 * 2 + i % 2;
            if (token >= num_tokens) continue;
#pragma unroll
            for (int tile = 0; tile < PART_TILES; ++tile) {
                partials[token * kPartialStride + tile * 16 + i / 2 * 8 + lane / 4] = sums[tile][token_tile][i];
            }
        }
    }
}

// The sum over the warps of a block that share rows, for four rows of a token.
__device__ __forceinline__ float4 sum_partials(const float* partials, int row_part, int token, int row) {
    const float* first = partials + (row_part * WARP_COLUMNS * kMaxTokens + token) * kPartialStride + row;
    float4 sum = *reinterpret_cast<const float4*>(first);
#pragma unroll
    for (int part = 1; part < WARP_COLUMNS; ++part) {
        const float4 more = *reinterpret_cast<const float4*>(first + part * kMaxTokens * kPartialStride);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    return sum;
}

// Scales, bias, rounding and the store of four outputs of a token.
__device__ __forceinline__ void store_outputs(float4 sum, int first, int token, const Weight& weight,
                                              const float* bias, Element* y) {
    if (first >= OUT_FEATURES) return;
    const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
    Element items[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int output = first + i;
        float value = sums[i];
        if (kRowScales) {
            const int row = output % 64, place = row % 8 * 8 + row / 16 * 2 + row / 8 % 2;
            const int64_t index = static_cast<int64_t>(output / 64) * 64 + place;
            if (SCALE_TYPE == 2) value *= reinterpret_cast<const float*>(weight.scales)[index];
            if (SCALE_TYPE == 1) {
                value *= __uint_as_float(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(weight.scales)[index]) << 16);
            }
            if (SCALE_TYPE == 0) value *= __half2float(reinterpret_cast<const __half*>(weight.scales)[index]);
            if (stored_bytes(SCALE_TYPE) == 1) value *= stored_number<SCALE_TYPE>(weight.scales[index], 0);
        }
        if (EXTRAS) value *= weight.factor;
        if (HAS_BIAS && output < OUT_FEATURES) value += bias[output];
        items[i] = from_float(value);
    }
    Element* target = y + static_cast<int64_t>(token) * OUT_FEATURES + first;
    if (OUT_FEATURES % 4 == 0) {
        *reinterpret_cast<uint2*>(target) = make_uint2(items[0] | items[1] << 16, items[2] | items[3] << 16);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i < OUT_FEATURES) target[i] = items[i];
        }
    }
}

// Adds up what the warps and blocks have of a pass's rows, and stores it.
__device__ __forceinline__ void finish_pass(uint8_t* shared, const float* partials, int pass, int cluster, int rank,
                                            int num_tokens, const Weight& weight, const float* bias, Element* y) {
    constexpr int kQuads = WARP_ROWS * kPartRows / 4;
#if __CUDA_ARCH__ >= 900
    const int buffer = pass % kReceivedBuffers;
    float* received = reinterpret_cast<float*>(shared + kReceivedOffset) + buffer * kReceivedFloats;
    const uint32_t barrier = shared_address(shared + kBarrierOffset) + (kReceivedBarrier + buffer) * 8;
    if (CLUSTER > 1 && threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier, CLUSTER * num_tokens * kOwnRows * 4);
    }
#endif
    __syncthreads();
    for (int i = threadIdx.x; i < num_tokens * kQuads; i += kThreads) {
        const int token = i / kQuads, row = i % kQuads * 4;  // of the pass
        const float4 sum = sum_partials(partials, row / kPartRows, token, row % kPartRows);
        if (CLUSTER > 1) {
#if __CUDA_ARCH__ >= 900
            const float* target = received + (rank * kMaxTokens + token) * kOwnRows + row % kOwnRows;
            const int owner = row / kOwnRows;
            remote_store(cluster_map(shared_address(target), owner), sum, cluster_map(barrier, owner));
#endif
        } else {
            store_outputs(sum, part_of(cluster, pass, row / kPartRows) * kPartRows + row % kPartRows, token, weight, bias, y);
        }
    }
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) {
        mbarrier_wait(barrier, pass / kReceivedBuffers % 2);
        constexpr int kOwnQuads = kOwnRows / 4;
        for (int i = threadIdx.x; i < num_tokens * kOwnQuads; i += kThreads) {
            const int token = i / kOwnQuads, own = i % kOwnQuads * 4, row = rank * kOwnRows + own;
            const float* first = received + token * kOwnRows + own;
            float4 sum = *reinterpret_cast<const float4*>(first);
#pragma unroll
            for (int source = 1; source < CLUSTER; ++source) {
                const float4 more = *reinterpret_cast<const float4*>(first + source * kMaxTokens * kOwnRows);
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            store_outputs(sum, part_of(cluster, pass, row / kPartRows) * kPartRows + row % kPartRows, token, weight, bias, y);
        }
    }
#endif
    if (kPasses > 1 && CLUSTER == 1) __syncthreads();  // the next pass's partial sums come to the same place
}

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
