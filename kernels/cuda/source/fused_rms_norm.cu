// Residual add and RMSNorm, optionally with dynamic quantization of the result. One block a row.
//
//   residual[row] += delta[row];   output = gain * residual / sqrt(mean(residual^2) + eps)
//
// The residual stream is float32, so that its additions lose nothing; a row stays in registers between the passes.
// Macros: HIDDEN_SIZE, THREADS, HAS_DELTA, HAS_ROWS (a list of the rows to compute, for those that need logits),
// and those of fused_quantize.cuh.
#include "fused_quantize.cuh"
#include "ptx/grid_dependency.cuh"

#ifndef HIDDEN_SIZE
#define HIDDEN_SIZE 4096
#endif
#ifndef THREADS
#define THREADS 512
#endif
#ifndef HAS_DELTA
#define HAS_DELTA 1
#endif
#ifndef HAS_ROWS
#define HAS_ROWS 0
#endif

constexpr int WIDTH = vector_width(HIDDEN_SIZE, 8);
constexpr int VECTORS = HIDDEN_SIZE / WIDTH;
constexpr int ITEMS = (VECTORS + THREADS - 1) / THREADS;
static_assert(ITEMS <= 16, "a row must fit into the block's registers");

extern "C" __global__ void __launch_bounds__(THREADS)
    fused_rms_norm(float* __restrict__ residual, const Element* __restrict__ delta, const float* __restrict__ gain,
                   const int* __restrict__ rows, Output* __restrict__ output, float* __restrict__ scales, float eps) {
  __shared__ float sums[32];
  __shared__ unsigned maxima[32];
  grid_dependency_launch();
  float factors[ITEMS][WIDTH];
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    const int column = (item * THREADS + threadIdx.x) * WIDTH;
    if (column < HIDDEN_SIZE) load(gain + column, factors[item]);
  }
  grid_dependency_wait();
  const long long source = static_cast<long long>(HAS_ROWS ? rows[blockIdx.x] : blockIdx.x) * HIDDEN_SIZE;
  const long long target = static_cast<long long>(blockIdx.x) * HIDDEN_SIZE;
  float values[ITEMS][WIDTH];
  float sum = 0.0f;
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    const int column = (item * THREADS + threadIdx.x) * WIDTH;
    if (column >= HIDDEN_SIZE) break;
    load(residual + source + column, values[item]);
    if (HAS_DELTA) {
      float added[WIDTH];
      load(delta + source + column, added);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) values[item][i] += added[i];
      if (!HAS_ROWS) store(residual + source + column, values[item]);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum += values[item][i] * values[item][i];
  }
  const float inverse = rsqrtf(block_sum<THREADS>(sum, sums) / HIDDEN_SIZE + eps);
  unsigned absmax = 0;
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    const int column = (item * THREADS + threadIdx.x) * WIDTH;
    if (column >= HIDDEN_SIZE) break;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      values[item][i] *= inverse * factors[item][i];
      absmax = max(absmax, magnitude_bits(values[item][i]));
    }
  }
  const float scale = row_scale<THREADS>(absmax, maxima, scales + blockIdx.x);
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    const int column = (item * THREADS + threadIdx.x) * WIDTH;
    if (column >= HIDDEN_SIZE) break;
    emit(output + target + column, values[item], scale);
  }
}
