// Inputs in the order of packed columns: y[token][i] = x[token][columns[i]], and 0 where columns[i] is negative.
#include "ptx/grid_dependency.cuh"
#include "types.cuh"

#ifndef THREADS
#define THREADS 256
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_columns(const uint16_t* x, const int32_t* columns, uint16_t* y, int32_t width, int32_t padded) {
    const int place = (blockIdx.y * THREADS + threadIdx.x) * 2;
    grid_dependency_launch();
    if (place >= padded) return;
    const int2 from = *reinterpret_cast<const int2*>(columns + place);
    grid_dependency_wait();
    const uint16_t* line = x + static_cast<int64_t>(blockIdx.x) * width;
    const uint32_t low = from.x < 0 ? 0 : line[from.x], high = from.y < 0 ? 0 : line[from.y];
    *reinterpret_cast<uint32_t*>(y + static_cast<int64_t>(blockIdx.x) * padded + place) = low | high << 16;
}
