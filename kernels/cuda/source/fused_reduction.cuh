// Sums and maxima over all threads of a block. Every thread gets the result; the order of additions is fixed.
#pragma once

#define FULL_WARP 0xffffffffu

template <int WIDTH>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
  return x;
}

template <int WIDTH>
__device__ __forceinline__ unsigned lane_max(unsigned x) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(FULL_WARP, x, offset));
  return x;
}

// `scratch` holds NUM_THREADS / 32 words, and may be used again only after another __syncthreads.
template <int NUM_THREADS>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  static_assert(NUM_THREADS % 32 == 0 && NUM_THREADS <= 1024, "whole warps");
  x = lane_sum<32>(x);
  if (NUM_THREADS == 32) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return lane_sum<32>(threadIdx.x % 32 < NUM_THREADS / 32 ? scratch[threadIdx.x % 32] : 0.0f);
}

template <int NUM_THREADS>
__device__ __forceinline__ unsigned block_max(unsigned x, unsigned* scratch) {
  static_assert(NUM_THREADS % 32 == 0 && NUM_THREADS <= 1024, "whole warps");
  x = lane_max<32>(x);
  if (NUM_THREADS == 32) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return lane_max<32>(threadIdx.x % 32 < NUM_THREADS / 32 ? scratch[threadIdx.x % 32] : 0u);
}
