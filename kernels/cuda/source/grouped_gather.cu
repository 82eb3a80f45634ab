// Inputs of sorted tokens: y[place] = x[rows[place]], its columns in the order of its expert's packed columns, and zeros
// behind them. 16-bit elements.
#include "ptx/grid_dependency.cuh"
#include "types.cuh"

#ifndef HAS_COLUMNS  // each expert has an order of its own: [experts][width of y], -1 for zeros
#define HAS_COLUMNS 0
#endif
#ifndef HAS_ROWS  // x is in the order of tokens, else in that of places
#define HAS_ROWS 1
#endif
#ifndef VECTOR  // items a thread moves at once, which divides the columns: 8 or 1
#define VECTOR 8
#endif
#ifndef THREADS
#define THREADS 256
#endif

struct Gather {
    const uint16_t* x;
    const int32_t* rows;
    const int32_t* owners;   // the expert of each place
    const int32_t* columns;
    const int32_t* count;    // places in use
    uint16_t* y;
    int width, padded;       // of x and y; `padded` is a multiple of 8
};
static_assert(VECTOR == 8 || VECTOR == 1, "16 bytes, or one element after another");

extern "C" __global__ void __launch_bounds__(THREADS) grouped_gather(const __grid_constant__ Gather gather) {
    const int64_t place = blockIdx.x;
    const int first = (blockIdx.y * THREADS + threadIdx.x) * 8;
    grid_dependency_launch();
    grid_dependency_wait();
    if (first >= gather.padded || place >= *gather.count) return;
    const uint16_t* line = gather.x + static_cast<int64_t>(HAS_ROWS ? gather.rows[place] : place) * gather.width;
    uint4* target = reinterpret_cast<uint4*>(gather.y + place * gather.padded + first);
    if (VECTOR == 8 && !HAS_COLUMNS) {
        *target = first < gather.width ? *reinterpret_cast<const uint4*>(line + first) : make_uint4(0, 0, 0, 0);
        return;
    }
    const int32_t* columns = gather.columns;
    if (HAS_COLUMNS) columns += static_cast<int64_t>(gather.owners[place]) * gather.padded + first;
    uint32_t items[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int column = HAS_COLUMNS ? columns[i] : first + i;
        items[i] = column >= 0 && column < gather.width ? line[column] : 0u;
    }
    *target = make_uint4(items[0] | items[1] << 16, items[2] | items[3] << 16, items[4] | items[5] << 16,
                         items[6] | items[7] << 16);
}
