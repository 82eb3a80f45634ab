// What a fused kernel gives out: elements, or 8-bit codes with a scale for each row.
//
// Macros: OUTPUT_FORMAT (0: elements, 1: FP8 e4m3 codes, 2: int8 codes), as in aphroquant/kernels/cuda/fused.
#pragma once

#include "fused_elements.cuh"
#include "fused_reduction.cuh"

#ifndef OUTPUT_FORMAT
#define OUTPUT_FORMAT 0
#endif
static_assert(OUTPUT_FORMAT >= 0 && OUTPUT_FORMAT <= 2, "elements, FP8 or int8");

#if OUTPUT_FORMAT == 0
typedef Element Output;
#elif OUTPUT_FORMAT == 1
typedef unsigned char Output;
#else
typedef signed char Output;
#endif

constexpr bool QUANTIZES = OUTPUT_FORMAT != 0;
constexpr float TOP_CODE = OUTPUT_FORMAT == 1 ? 448.0f : 127.0f;

template <int COUNT>
__device__ __forceinline__ void emit(Output* target, const float (&values)[COUNT], float scale) {
  Vector<Output, COUNT> vector;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
#if OUTPUT_FORMAT == 0
    vector.items[i] = to_element(values[i]);
#elif OUTPUT_FORMAT == 1
    vector.items[i] = float8_code(values[i], scale);
#else
    vector.items[i] = int8_code(values[i], scale);
#endif
  }
  *reinterpret_cast<Vector<Output, COUNT>*>(target) = vector;
}

// The scale of a row from its threads' largest magnitudes, written once; 1 where nothing is quantized.
template <int NUM_THREADS>
__device__ __forceinline__ float row_scale(unsigned absmax_bits, unsigned* scratch, float* target) {
  if (!QUANTIZES) return 1.0f;
  const float scale = dynamic_scale(block_max<NUM_THREADS>(absmax_bits, scratch), TOP_CODE);
  if (threadIdx.x == 0) *target = scale;
  return scale;
}
