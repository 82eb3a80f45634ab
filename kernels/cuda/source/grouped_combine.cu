// Results of sorted tokens back to their tokens: y[t] = sum over k of weights[t][k] * x[places[t][k]], in the order of k,
// added up in float32. Pairs without a place add nothing.
#include "fused_elements.cuh"
#include "ptx/grid_dependency.cuh"
#include "types.cuh"

#ifndef TOP_K
#define TOP_K 8
#endif
#ifndef VECTOR  // items a thread moves at once, which divides the columns
#define VECTOR 8
#endif
#ifndef THREADS
#define THREADS 128
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    grouped_combine(const Element* x, const int32_t* places, const float* weights, Element* y, int columns) {
    const int column = (blockIdx.y * THREADS + threadIdx.x) * VECTOR;
    const int64_t token = blockIdx.x;
    grid_dependency_launch();
    grid_dependency_wait();
    if (column >= columns) return;
    float sums[VECTOR] = {};
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) {
        const int place = places[token * TOP_K + k];
        if (place < 0) continue;
        const float weight = weights[token * TOP_K + k];
        float values[VECTOR];
        load(x + static_cast<int64_t>(place) * columns + column, values);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sums[i] = fmaf(weight, values[i], sums[i]);
    }
    store(y + token * columns + column, sums);
}
