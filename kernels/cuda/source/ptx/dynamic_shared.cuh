// The block's dynamic shared memory.
#pragma once

extern __shared__ __align__(128) unsigned char aphroquant_dynamic_shared[];

__device__ __forceinline__ unsigned char* dynamic_shared() { return aphroquant_dynamic_shared; }
