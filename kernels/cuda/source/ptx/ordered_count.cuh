// Counting blocks in global memory, in order with what they write and read there.
#pragma once

// Adds 1 and gives the number before. What this thread has seen written is visible to threads that see the new number,
// and what was written before the old one is visible to this thread.
__device__ __forceinline__ int count_ordered(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
