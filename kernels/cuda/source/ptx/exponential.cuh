// The fast power of two.
#pragma once

// 2^x within 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
