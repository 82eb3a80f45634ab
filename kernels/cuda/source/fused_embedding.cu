// Rows of the embedding table as the float32 residual stream: residual[t] = table[token_ids[t]].
//
// Macros: HIDDEN_SIZE, THREADS, and that of fused_elements.cuh.
#include "fused_elements.cuh"
#include "ptx/grid_dependency.cuh"

#ifndef HIDDEN_SIZE
#define HIDDEN_SIZE 4096
#endif
#ifndef THREADS
#define THREADS 256
#endif

constexpr int WIDTH = vector_width(HIDDEN_SIZE, 8);

extern "C" __global__ void __launch_bounds__(THREADS)
    fused_embedding(const int* __restrict__ token_ids, const Element* __restrict__ table,
                    float* __restrict__ residual) {
  grid_dependency_launch();
  grid_dependency_wait();
  const Element* source = table + static_cast<long long>(token_ids[blockIdx.x]) * HIDDEN_SIZE;
  float* target = residual + static_cast<long long>(blockIdx.x) * HIDDEN_SIZE;
  for (int column = threadIdx.x * WIDTH; column < HIDDEN_SIZE; column += THREADS * WIDTH) {
    float values[WIDTH];
    load(source + column, values);
    store(target + column, values);
  }
}
