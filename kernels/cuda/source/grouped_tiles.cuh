// Tiles of tokens that one expert multiplies, for kernels with the macro GROUPED: their tokens are sorted by expert, each
// expert has a weight of its own, and a list on the device, made by grouped_route.cu, tells the tiles.
#pragma once

#include "ptx/grid_dependency.cuh"
#include "types.cuh"

#ifndef GROUPED
#define GROUPED 0
#endif
#ifndef EARLY_TILES  // the list is complete before this kernel can start: weights are loaded while the kernel in front ends
#define EARLY_TILES 0
#endif

struct alignas(16) GroupTile {
    int expert;
    int first, end;  // of the sorted tokens
    int line;        // where the scales of its tokens begin in a line of scales: a multiple of 4
};

// Read past the caches of a multiprocessor, which may hold what an earlier list had in the same place.
struct GroupTiles {
    const GroupTile* tiles;
    const int* count;

    __device__ __forceinline__ int size() const { return __ldcg(count); }
    __device__ __forceinline__ GroupTile tile(int index) const {
        const int4 words = __ldcg(reinterpret_cast<const int4*>(tiles) + index);
        return {words.x, words.y, words.z, words.w};
    }
};

// The start of a kernel with GROUPED. Without EARLY_TILES it lets the next kernel start no sooner than the list of tiles is
// complete: a kernel with EARLY_TILES may follow, after any number of others.
__device__ __forceinline__ void enter_group() {
    if (!EARLY_TILES) grid_dependency_wait();
    grid_dependency_launch();
}
