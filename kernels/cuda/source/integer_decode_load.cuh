// How integer_decode.cu brings the weight and the inputs to shared memory.
#pragma once

#include "integer_decode_shape.cuh"
#if __CUDA_ARCH__ >= 900
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#else
#include "ptx/async_copy.cuh"
#endif

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
