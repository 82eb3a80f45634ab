// Sums of several blocks to outputs, without a second kernel: the block that ends last adds them up in their fixed order.
//
// Clusters would do it in shared memory, but of four and eight blocks some find no room on GPUs whose groups of
// multiprocessors differ in size, and then wait for a second turn.
#pragma once

#include "aqlm_elements.cuh"
#include "ptx/ordered_count.cuh"

// Whether this block is the last of `parts` to come here; true for all of its threads. What the others wrote before is
// visible then, through L2. The counter is 0 before the first and after the last.
__device__ __forceinline__ bool ends_last(int* counter, int parts) {
    __shared__ int before;
    __syncthreads();
    if (threadIdx.x == 0) {
        before = count_ordered(counter);
        if (before == parts - 1) *counter = 0;
    }
    __syncthreads();
    return before == parts - 1;
}

// Adds up `parts` lines of partial sums [parts][line] for the rows from `first` to `end` - 1.
template <int THREADS>
__device__ __forceinline__ void combine(const float* partials, int64_t line, int parts, int first, int end,
                                        const float* scales, const float* bias, uint16_t* output) {
    for (int row = first + threadIdx.x; row < end; row += THREADS) {
        const float scale = scales[row], addend = bias == nullptr ? 0.0f : bias[row];
        float sum = 0.0f;
        int part = 0;
        for (; part + 8 <= parts; part += 8) {
            float values[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] = __ldcg(partials + (part + i) * line + row);
            sum += ((values[0] + values[1]) + (values[2] + values[3])) +
                   ((values[4] + values[5]) + (values[6] + values[7]));
        }
        for (; part < parts; ++part) sum += __ldcg(partials + part * line + row);
        output[row] = element_bits(fmaf(sum, scale, addend));
    }
}
