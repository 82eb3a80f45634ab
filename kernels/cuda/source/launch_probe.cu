// Small kernels that show whether launching works: arguments, shared memory, clusters, dependent launches, tensor maps.
#include "types.cuh"

#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dynamic_shared.cuh"
#include "ptx/grid_dependency.cuh"

struct alignas(16) Affine {
    int32_t count;
    float scale;
    double offset;
};

// y[i] = scale * x[i] + offset + shift, through dynamic shared memory and after the kernel in front of this one.
extern "C" __global__ void launch_probe(const float* x, float* y, const Affine affine, const int8_t shift) {
    float* staged = reinterpret_cast<float*>(dynamic_shared());
    grid_dependency_launch();
    grid_dependency_wait();
    const int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    staged[threadIdx.x] = i < affine.count ? x[i] : 0.0f;
    __syncthreads();
    if (i < affine.count) y[i] = affine.scale * staged[threadIdx.x] + static_cast<float>(affine.offset) + shift;
}

extern "C" __global__ void empty_probe(const void*, const void*, const void*, const void*, int32_t, int32_t) {}

#if __CUDA_ARCH__ >= 900
// ranks[block] = its rank in its cluster.
extern "C" __global__ void cluster_probe(int32_t* ranks) {
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x == 0) ranks[blockIdx.x] = static_cast<int32_t>(cluster_rank());
}

// tile = the TILE x TILE floats of the map's tensor that start at (row, column).
extern "C" __global__ void tensor_map_probe(const __grid_constant__ TensorMap map, float* tile, int32_t row,
                                            int32_t column) {
    constexpr int32_t kTile = 8;
    __shared__ alignas(128) float staged[kTile * kTile];
    __shared__ uint64_t barrier;
    const uint32_t address = shared_address(&barrier);
    if (threadIdx.x == 0) {
        mbarrier_init(address, 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(address, sizeof(staged));
        tensor_load(shared_address(staged), &map, column, row, address, kCacheEvictNormal);
    }
    __syncthreads();
    while (!mbarrier_try_wait(address, 0)) {
    }
    tile[threadIdx.x] = staged[threadIdx.x];
}
#endif
