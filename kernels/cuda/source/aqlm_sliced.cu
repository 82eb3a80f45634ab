// One token times AQLM weights with a large codebook, which is cut into slices that fit into shared memory.
//
// Gathering 16 bytes for each code from L2 is bound by the number of requests, at a tenth of what shared memory serves. So
// a block keeps 8192 entries in shared memory, and with them the products of the codes that fall into this slice: the
// codes were sorted by slices when the layer was made, and so each comes with the input group that it belongs to.
//
// Codes come in groups of 8 rows. Of each row a step has four positions: lane 8 m + i has the code at position m of row i,
// and gives ldmatrix the address of its entry and that of its inputs. The entries are rows of A, the inputs columns of B:
// the diagonal of the product is what is wanted, and two positions are added by one instruction. The inputs lie there in 8
// copies, one for each row of the group, so that they never meet in a bank; for the entries the order of positions does
// what it can.
//
// A unit is a slice of the entries and a chunk of the input groups. Partial sums go to memory under the rows' own numbers
// (rows are sorted so that the 8 of a group have about as many codes); the last block of a range of rows adds them up.
// Macros: ELEMENT_IS_BF16, WARPS.
#include "aqlm_combine.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/gather_matrices.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/stream_load.cuh"
#include "ptx/warp_matrix.cuh"

#ifndef WARPS
#define WARPS 16
#endif

constexpr int kThreads = WARPS * 32;
constexpr int kEntryBytes = 16, kSliceEntries = 8192, kSliceBytes = kSliceEntries * kEntryBytes;
constexpr int kCopies = 8;           // of the inputs
constexpr int kQuadSteps = 4, kQuadBytes = kQuadSteps * 32 * 3;
constexpr int kAhead = 4;            // quads under way
constexpr int kCopyBytes = 16384;    // of a slice, by one instruction
constexpr int kBarrierBytes = 128;

struct Problem {
    int rows, groups;               // outputs, and inputs / 8
    int chunks, chunk_groups;       // of the input groups
    int row_groups, range_groups;   // groups of 8 rows: all, and of a block
    int entries;                    // of all codebooks
    const unsigned char* quads;     // [quads][kQuadBytes]: low 16 bits [lane][step], then high 8 bits [lane][step]
    const int* offsets;             // [units][row_groups + 1]: first step of each
    const int* row_numbers;         // [units][row_groups][8]
    const unsigned char* books;     // [entries] of 8 elements
    const float* scales;            // [rows]
    const float* bias;              // [rows] or null
    const uint4* input;             // [groups] of 8 elements
    uint16_t* output;               // [rows]
    float* partials;                // [units][row_groups * 8]
    int* counters;                  // [ranges], zeros
};

struct Quad {
    uint2 low;
    uint32_t high;
};

__device__ __forceinline__ Quad load_quad(const Problem& problem, int quad) {
    const unsigned char* const place = problem.quads + static_cast<int64_t>(quad) * kQuadBytes;
    const int lane = threadIdx.x % 32;
    return {load_once(reinterpret_cast<const uint2*>(place + lane * 8)),
            load_once(reinterpret_cast<const uint32_t*>(place + 256 + lane * 4))};
}

// Begins the copy of a slice of the codebook.
__device__ __forceinline__ void begin_slice(const Problem& problem, uint32_t target, uint32_t barrier, int slice) {
    const int first = slice * kSliceEntries;
    const int bytes = min(kSliceEntries, problem.entries - first) * kEntryBytes;
    mbarrier_arrive_expect(barrier, bytes);
    for (int done = 0; done < bytes; done += kCopyBytes) {
        bulk_load(target + done, problem.books + static_cast<int64_t>(first) * kEntryBytes + done,
                  min(kCopyBytes, bytes - done), barrier, kCacheEvictLast);
    }
}

// The chunk's inputs, and zeros behind them for codes that only fill a step.
__device__ __forceinline__ void copy_inputs(const Problem& problem, uint4* inputs, int chunk) {
    for (int i = threadIdx.x; i < (problem.chunk_groups + 1) * kCopies; i += kThreads) {
        const int local = i / kCopies, group = chunk * problem.chunk_groups + local;
        const bool valid = local < problem.chunk_groups && group < problem.groups;
        inputs[i] = valid ? problem.input[group] : uint4{0u, 0u, 0u, 0u};
    }
}

// A step: 13 bits of the entry, then those of the input group.
__device__ __forceinline__ void multiply_step(uint32_t entries, uint32_t inputs, uint32_t low, uint32_t high,
                                              float (&sums)[2][4]) {
    uint32_t a[4], b[4];
    gather_matrices(a, entries + ((low << 4) & 0x1fff0u));
    gather_matrices(b, inputs + ((low >> 6 & 0x380u) | high << 10));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t upper[4] = {a[half * 2], 0u, a[half * 2 + 1], 0u};
        multiply_add<kIsBfloat>(sums[half], upper, b[half * 2], b[half * 2 + 1]);
    }
}

// A warp's groups, one after the other in the stream of steps.
struct Stream {
    int group, end;
    int left;         // steps of the group
    int next_offset;  // where the group behind it ends
    int row;          // that this lane's sum is of
    int next_row;
};

__device__ __forceinline__ void next_group(const Problem& problem, const int* offsets, const int* row_numbers,
                                           Stream& stream) {
    const int row = threadIdx.x % 32 / 4;
    ++stream.group;
    stream.row = stream.next_row;
    const int begin = stream.next_offset;
    const int ahead = min(stream.group + 1, problem.row_groups - 1);
    stream.next_offset = offsets[min(stream.group + 1, problem.row_groups)];
    stream.next_row = row_numbers[ahead * 8 + row];
    stream.left = stream.next_offset - begin;
}

__device__ __forceinline__ void end_group(float* partials, bool is_own, const Stream& stream, float (&sums)[2][4]) {
    const int lane = threadIdx.x % 32, row = lane / 4;
    const float sum = row % 2 == 0 ? sums[0][0] + sums[1][0] : sums[0][1] + sums[1][1];
    if (is_own && lane % 4 == row / 2) partials[stream.row] = sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][i] = sums[1][i] = 0.0f;
}

__device__ __forceinline__ void multiply_groups(const Problem& problem, int unit, int first, int end,
                                                Quad (&quads)[kAhead], uint32_t entries, uint32_t inputs) {
    const int* const offsets = problem.offsets + static_cast<int64_t>(unit) * (problem.row_groups + 1);
    const int* const row_numbers = problem.row_numbers + static_cast<int64_t>(unit) * problem.row_groups * 8;
    float* const partials = problem.partials + static_cast<int64_t>(unit) * problem.row_groups * 8;
    const int begin = offsets[first];
    int quad = begin / kQuadSteps + kAhead;
    // What the first quad has of the group in front counts as a group whose sums nobody wants.
    Stream stream{first - 1, end, begin % kQuadSteps, begin, 0, row_numbers[first * 8 + threadIdx.x % 32 / 4]};
    float sums[2][4] = {};
    const uint32_t own_inputs = inputs + threadIdx.x % kCopies * 16;
    if (stream.left == 0) next_group(problem, offsets, row_numbers, stream);
    while (stream.group < end) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const Quad current = quads[i];
            quads[i] = load_quad(problem, quad + i);
#pragma unroll
            for (int step = 0; step < kQuadSteps; ++step) {
                const uint32_t pair = step < 2 ? current.low.x : current.low.y;
                const uint32_t low = step % 2 == 0 ? pair & 0xffffu : pair >> 16;
                multiply_step(entries, own_inputs, low, current.high >> (step * 8) & 0xffu, sums);
                if (--stream.left == 0) {
                    end_group(partials, stream.group >= first && stream.group < end, stream, sums);
                    next_group(problem, offsets, row_numbers, stream);
                }
            }
        }
        quad += kAhead;
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) aqlm_sliced(const __grid_constant__ Problem problem) {
    unsigned char* const shared = dynamic_shared();
    const uint32_t barrier = shared_address(shared), entries = barrier + kBarrierBytes;
    const uint32_t inputs = entries + kSliceBytes;
    const int warp = threadIdx.x / 32, unit = blockIdx.x, units = gridDim.x;
    const int first = blockIdx.y * problem.range_groups;
    const int count = min(problem.range_groups, problem.row_groups - first);
    const int own_first = first + count * warp / WARPS, own_end = first + count * (warp + 1) / WARPS;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        begin_slice(problem, entries, barrier, unit / problem.chunks);
    }
    Quad quads[kAhead];
    const int quad = problem.offsets[static_cast<int64_t>(unit) * (problem.row_groups + 1) + own_first] / kQuadSteps;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) quads[i] = load_quad(problem, quad + i);
    grid_dependency_launch();
    grid_dependency_wait();
    copy_inputs(problem, reinterpret_cast<uint4*>(shared + kBarrierBytes + kSliceBytes), unit % problem.chunks);
    __syncthreads();
    mbarrier_wait(barrier, 0);
    if (own_first < own_end) multiply_groups(problem, unit, own_first, own_end, quads, entries, inputs);
    if (!ends_last(problem.counters + blockIdx.y, units)) return;
    // Rows are sorted within windows that no range cuts.
    combine<kThreads>(problem.partials, static_cast<int64_t>(problem.row_groups) * 8, units, first * 8,
                      min((first + count) * 8, problem.rows), problem.scales, problem.bias, problem.output);
}
