// Pairs of a token and an expert, sorted by expert: where each pair goes, whose row each place holds, and the tiles of
// tokens that kernels with the macro GROUPED work through. One block, no atomics whose order shows: pairs of an expert
// stay in their order, so that the same ids give the same places.
//
// Each warp has a part of the pairs in a row. It counts them by expert; the counts are summed up over warps and experts;
// then it goes over its part again, in order, and the pairs of a round that have the same expert line up by their lanes.
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

constexpr int kThreads = WARPS * 32;
constexpr int kLine = 4;  // scales of an expert's tokens begin at multiples of so many
constexpr int kPlaces = 0, kLines = 1, kTiles = 2;  // what is summed up over experts
constexpr int kSums = kTiles + NUM_SIZES;
static_assert(ID_BYTES == 4 || ID_BYTES == 8, "ids are int32 or int64");

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
    const int lane = threadIdx.x % 32;
    int before = 0;
    for (int first = 0; first < experts; first += 32) {
        const int expert = first + lane, own = expert < experts ? share(sum, totals[expert]) : 0;
        int through = own;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int more = __shfl_up_sync(0xFFFFFFFFu, through, distance);
            if (lane >= distance) through += more;
        }
        if (expert < experts) starts[expert] = before + through - own;
        before += __shfl_sync(0xFFFFFFFFu, through, 31);
    }
    if (lane == 0) starts[experts] = before;
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

__device__ __forceinline__ int expert_of(const Route& route, int pair) {
    if (pair >= route.pairs) return -1;
    const Id id = route.ids[pair];
    return id >= 0 && id < route.experts ? static_cast<int>(id) : -1;
}

__device__ __forceinline__ void place_pair(const Route& route, int pair, int expert, int place, const int* first_places,
                                           const int* first_lines) {
    route.places[pair] = expert < 0 ? -1 : place;
    if (expert < 0) return;
    route.rows[place] = pair / route.top_k;
    route.owners[place] = expert;
    route.lines[place] = first_lines[expert] + place - first_places[expert];
}

extern "C" __global__ void __launch_bounds__(kThreads) grouped_route(const __grid_constant__ Route route) {
    const int experts = route.experts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int* counts = reinterpret_cast<int*>(dynamic_shared());  // [WARPS][experts]
    int* totals = counts + WARPS * experts;                  // [experts]
    int* starts = totals + experts;                          // [kSums][experts + 1]
    grid_dependency_launch();
    for (int i = threadIdx.x; i < WARPS * experts; i += kThreads) counts[i] = 0;
    grid_dependency_wait();
    __syncthreads();
    int* own_counts = counts + warp * experts;
    const int part = round_up((route.pairs + WARPS - 1) / WARPS, 32), first = warp * part;
    const int end = min(first + part, route.pairs);
    for (int pair = first + lane; pair < end; pair += 32) {
        const int expert = expert_of(route, pair);
        if (expert >= 0) atomicAdd(own_counts + expert, 1);
    }
    __syncthreads();
    for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
        int before = 0;
        for (int i = 0; i < WARPS; ++i) {
            const int own = counts[i * experts + expert];
            counts[i * experts + expert] = before;
            before += own;
        }
        totals[expert] = before;
    }
    __syncthreads();
    for (int sum = warp; sum < kSums; sum += WARPS) sum_up(totals, experts, sum, starts + sum * (experts + 1));
    __syncthreads();

    const int *first_places = starts, *first_lines = starts + (experts + 1);
    for (int begin = first; begin < end; begin += 32) {
        const int expert = expert_of(route, begin + lane);
        const unsigned same = __match_any_sync(0xFFFFFFFFu, expert), before = same & ((1u << lane) - 1);
        const int place = expert < 0 ? 0 : first_places[expert] + own_counts[expert] + __popc(before);
        if (begin + lane < end) place_pair(route, begin + lane, expert, place, first_places, first_lines);
        __syncwarp();
        if (expert >= 0 && before == 0) own_counts[expert] += __popc(same);
        __syncwarp();
    }
    for (int expert = threadIdx.x; expert <= experts; expert += kThreads) route.offsets[expert] = first_places[expert];
#pragma unroll
    for (int size = 0; size < NUM_SIZES; ++size) {
        const int* first_tiles = starts + (kTiles + size) * (experts + 1);
        const int count = first_tiles[experts], tokens = SMALLEST << size;
        if (threadIdx.x == 0) route.counts[size] = count;
        for (int i = threadIdx.x; i < count; i += kThreads) {
            const int expert = find(first_tiles, experts, i), skipped = (i - first_tiles[expert]) * tokens;
            const int place = first_places[expert] + skipped;
            route.tiles[size][i] = {expert, place, min(place + tokens, first_places[expert + 1]),
                                    first_lines[expert] + skipped};
        }
    }
}
