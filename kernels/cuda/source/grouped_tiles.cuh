// Tiles of tokens that one expert multiplies, for kernels with the macro GROUPED: their tokens are sorted by expert, each
// expert has a weight of its own, and a list on the device, made by grouped_route.cu, tells the tiles.
#pragma once

#include "types.cuh"

#ifndef GROUPED
#define GROUPED 0
#endif

struct alignas(16) GroupTile {
    int expert;
    int first, end;  // of the sorted tokens
    int line;        // where the scales of its tokens begin in a line of scales: a multiple of 4
};

struct GroupTiles {
    const GroupTile* tiles;
    const int* count;
};
