// Programmatic dependent launch: a kernel may start while the one before it in the stream still runs.
#pragma once

// Waits until the kernels before this one have ended and their writes are visible. Without a programmatic launch it
// returns at once.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start as soon as there is room for them.
__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A read of what a kernel in front has written; the compiler never moves it before the wait.
__device__ __forceinline__ float load_written(const float* address) {
    float value;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
    return value;
}
