// activation(gate) * up, optionally with dynamic quantization of the result; gate and up are the halves of a row.
//
// Without quantization blocks share a row's columns; with it one block has the whole row, because the scale needs it.
// Macros: SIZE (columns of the result), THREADS, ACTIVATION (0: SiLU, 1: GELU by tanh, 2: GELU), and those of
// fused_quantize.cuh.
#include "fused_quantize.cuh"
#include "ptx/grid_dependency.cuh"

#ifndef SIZE
#define SIZE 14336
#endif
#ifndef THREADS
#define THREADS 256
#endif
#ifndef ACTIVATION
#define ACTIVATION 0
#endif

constexpr int WIDTH = vector_width(SIZE, 8);
constexpr int ITEMS = QUANTIZES ? (SIZE / WIDTH + THREADS - 1) / THREADS : 1;
static_assert(ITEMS <= 16, "a row must fit into the block's registers");

__device__ __forceinline__ float activated(float x) {
  if (ACTIVATION == 0) return x / (1.0f + __expf(-x));
  if (ACTIVATION == 1) return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fused_gated_activation(const Element* __restrict__ gate_up, Output* __restrict__ output,
                           float* __restrict__ scales) {
  __shared__ unsigned maxima[32];
  grid_dependency_launch();
  grid_dependency_wait();
  const long long row = blockIdx.y;
  const Element* gate = gate_up + row * 2 * SIZE;
  float values[ITEMS][WIDTH];
  unsigned absmax = 0;
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    const int column = ((item + blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
    if (column >= SIZE) break;
    float up[WIDTH];
    load(gate + column, values[item]);
    load(gate + SIZE + column, up);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      values[item][i] = activated(values[item][i]) * up[i];
      absmax = max(absmax, magnitude_bits(values[item][i]));
    }
  }
  const float scale = row_scale<THREADS>(absmax, maxima, scales + row);
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    const int column = ((item + blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
    if (column >= SIZE) break;
    emit(output + row * SIZE + column, values[item], scale);
  }
}
