// Pairs of a token and an expert, sorted by expert: where each pair goes, whose row each place holds, and the tiles of
// tokens that kernels with the macro GROUPED work through. No atomics whose order shows: pairs of an expert stay in their
// order, so that the same ids give the same places.
//
// Each warp has a part of the pairs in a row. It counts them by expert; the counts are summed up over warps and experts;
// then it goes over its part again, in order, and the pairs of a round that have the same expert line up by their lanes.
// Many pairs take several blocks, for the sake of their scattered writes: grouped_count counts for each block beforehand.
#include "grouped_tiles.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"
#include "types.cuh"

#ifndef ID_BYTES  // of an expert's id: 4 or 8
#define ID_BYTES 4
#endif
#ifndef NUM_SIZES  // of tiles: SMALLEST tokens, and doubled each time
#define NUM_SIZES 6
#endif
#ifndef SMALLEST
#define SMALLEST 8
#endif
#ifndef WARPS
#define WARPS 32
#endif
#ifndef BLOCKS
#define BLOCKS 1
#endif

constexpr int kThreads = WARPS * 32;
constexpr int kBatch = 8;  // rounds of 32 pairs whose ids a warp loads at once
constexpr int kLine = 4;  // scales of an expert's tokens begin at multiples of so many
constexpr int kPlaces = 0, kLines = 1, kTiles = 2;  // what is summed up over experts
constexpr int kSums = kTiles + NUM_SIZES;
static_assert(ID_BYTES == 4 || ID_BYTES == 8, "ids are int32 or int64");
static_assert(WARPS >= NUM_SIZES, "a warp for each list");

#if ID_BYTES == 8
using Id = int64_t;
#else
using Id = int32_t;
#endif

struct Route {
    int pairs, experts, top_k;
    const Id* ids;              // [pairs]; pairs of other ids are left out
    int32_t* places;            // [pairs]: where each pair goes; -1
    int32_t* rows;              // [places]: the token of each place
    int32_t* owners;            // [places]: its expert
    int32_t* lines;             // [places]: where its scale stands in a line of scales
    int32_t* offsets;           // [experts + 1]: the first place of each expert
    int32_t* block_counts;      // [BLOCKS][experts]: pairs of each expert, with several blocks
    int32_t* counts;            // [NUM_SIZES]: how many tiles there are
    GroupTile* tiles[NUM_SIZES];
};

__device__ __forceinline__ int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// What an expert with so many pairs adds to a sum.
__device__ __forceinline__ int share(int sum, int pairs) {
    if (sum == kPlaces) return pairs;
    if (sum == kLines) return round_up(pairs, kLine);
    const int size = SMALLEST << (sum - kTiles);
    return (pairs + size - 1) / size;
}

// starts[i] = what the experts before i add up to, by one warp; starts[experts] is the total.
__device__ __forceinline__ void sum_up(const int* totals, int experts, int sum, int* starts) {
    const int lane = threadIdx.x % 32, part = (experts + 31) / 32, first = lane * part, end = min(first + part, experts);
    int own = 0;
    for (int expert = first; expert < end; ++expert) own += share(sum, totals[expert]);
    int through = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int more = __shfl_up_sync(0xFFFFFFFFu, through, distance);
        if (lane >= distance) through += more;
    }
    int before = through - own;
    for (int expert = first; expert < end; ++expert) {
        starts[expert] = before;
        before += share(sum, totals[expert]);
    }
    if (lane == 31) starts[experts] = through;
}

// The expert whose part of the sum holds `index`.
__device__ __forceinline__ int find(const int* starts, int experts, int index) {
    int low = 0, high = experts;  // starts[low] <= index < starts[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (starts[middle] <= index) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// The experts of kBatch rounds of pairs from `begin` on, of this lane; -1 for none. Their loads wait for each other once.
__device__ __forceinline__ void load_experts(const Route& route, int begin, int end, int (&experts)[kBatch]) {
    Id ids[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
        const int pair = begin + i * 32 + threadIdx.x % 32;
        ids[i] = pair < end ? route.ids[pair] : -1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
        experts[i] = ids[i] >= 0 && ids[i] < route.experts ? static_cast<int>(ids[i]) : -1;
    }
}

__device__ __forceinline__ void place_pair(const Route& route, int pair, int expert, int place, const int* first_places,
                                           const int* first_lines) {
    route.places[pair] = expert < 0 ? -1 : place;
    if (expert < 0) return;
    route.rows[place] = pair / route.top_k;
    route.owners[place] = expert;
    route.lines[place] = first_lines[expert] + place - first_places[expert];
}

// The pairs of a warp's part, in their order. `counts`: pairs of each expert in the parts before; they count on.
__device__ __forceinline__ void place_part(const Route& route, int first, int end, int* counts, const int* first_places,
                                           const int* first_lines) {
    const int lane = threadIdx.x % 32;
    for (int begin = first; begin < end; begin += kBatch * 32) {
        int experts[kBatch];
        load_experts(route, begin, end, experts);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int pair = begin + i * 32 + lane, expert = experts[i];
            if (begin + i * 32 >= end) break;
            const unsigned same = __match_any_sync(0xFFFFFFFFu, expert), before = same & ((1u << lane) - 1);
            const int place = expert < 0 ? 0 : first_places[expert] + counts[expert] + __popc(before);
            if (pair < end) place_pair(route, pair, expert, place, first_places, first_lines);
            __syncwarp();
            if (expert >= 0 && before == 0) counts[expert] += __popc(same);
            __syncwarp();
        }
    }
}

// The tiles of one size, which some of the warps list.
__device__ __forceinline__ void list_tiles(const Route& route, const int* starts) {
    const int experts = route.experts, warp = threadIdx.x / 32, size = warp % NUM_SIZES;
    const int* first_places = starts;
    const int* first_lines = starts + (experts + 1);
    const int* first_tiles = starts + (kTiles + size) * (experts + 1);
    const int count = first_tiles[experts], tokens = SMALLEST << size;
    const int listing = (WARPS - size + NUM_SIZES - 1) / NUM_SIZES * 32;  // threads of a block
    const int own = blockIdx.x * listing + warp / NUM_SIZES * 32 + threadIdx.x % 32;
    if (own == 0) route.counts[size] = count;
    for (int i = own; i < count; i += listing * BLOCKS) {
        const int expert = find(first_tiles, experts, i), skipped = (i - first_tiles[expert]) * tokens;
        const int place = first_places[expert] + skipped;
        route.tiles[size][i] = {expert, place, min(place + tokens, first_places[expert + 1]),
                                first_lines[expert] + skipped};
    }
}

// The pairs of a warp, in the order of blocks and warps.
struct Part {
    int first, end;

    __device__ __forceinline__ explicit Part(const Route& route) {
        const int size = round_up((route.pairs + WARPS * BLOCKS - 1) / (WARPS * BLOCKS), 32);
        first = static_cast<int>(blockIdx.x * WARPS + threadIdx.x / 32) * size;
        end = min(first + size, route.pairs);
    }
};

__device__ __forceinline__ void count_part(const Route& route, const Part& part, int* counts) {
    for (int begin = part.first; begin < part.end; begin += kBatch * 32) {
        int found[kBatch];
        load_experts(route, begin, part.end, found);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (found[i] >= 0) atomicAdd(counts + found[i], 1);
        }
    }
}

// What each block's pairs count up to, by expert.
extern "C" __global__ void __launch_bounds__(kThreads) grouped_count(const __grid_constant__ Route route) {
    int* counts = reinterpret_cast<int*>(dynamic_shared());  // [experts]
    for (int i = threadIdx.x; i < route.experts; i += kThreads) counts[i] = 0;
    grid_dependency_launch();
    grid_dependency_wait();
    __syncthreads();
    count_part(route, Part(route), counts);
    __syncthreads();
    int32_t* target = route.block_counts + blockIdx.x * route.experts;
    for (int i = threadIdx.x; i < route.experts; i += kThreads) target[i] = counts[i];
}

extern "C" __global__ void __launch_bounds__(kThreads) grouped_route(const __grid_constant__ Route route) {
    const int experts = route.experts, warp = threadIdx.x / 32;
    int* counts = reinterpret_cast<int*>(dynamic_shared());  // [WARPS][experts]
    int* totals = counts + WARPS * experts;                  // [experts]
    int* starts = totals + experts;                          // [kSums][experts + 1]
    const Part part(route);
    const bool few = BLOCKS == 1 && route.pairs <= 32;  // then the first warp has them all
    const int counting = few ? 1 : WARPS;
    int* own_counts = counts + warp * experts;
    for (int i = threadIdx.x; i < counting * experts; i += kThreads) counts[i] = 0;
    grid_dependency_launch();
    grid_dependency_wait();
    __syncthreads();
    count_part(route, part, own_counts);
    __syncthreads();
    for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
        int before = 0, behind = 0;  // in other blocks
#pragma unroll
        for (int block = 0; block < (BLOCKS > 1 ? BLOCKS : 0); ++block) {
            const int own = __ldcg(route.block_counts + block * experts + expert);
            if (block < static_cast<int>(blockIdx.x)) before += own;
            if (block > static_cast<int>(blockIdx.x)) behind += own;
        }
        for (int i = 0; i < counting; ++i) {
            const int own = counts[i * experts + expert];
            counts[i * experts + expert] = before;
            before += own;
        }
        totals[expert] = before + behind;
    }
    __syncthreads();
    for (int sum = warp; sum < kSums; sum += WARPS) sum_up(totals, experts, sum, starts + sum * (experts + 1));
    __syncthreads();
    list_tiles(route, starts);
    for (int expert = threadIdx.x; expert <= experts && blockIdx.x == 0; expert += kThreads) {
        route.offsets[expert] = starts[expert];
    }
    place_part(route, part.first, part.end, own_counts, starts, starts + (experts + 1));
}
