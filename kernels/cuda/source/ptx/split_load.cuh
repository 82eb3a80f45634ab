// Reads of a table whose beginning is in shared memory and whose rest is in global memory.
#pragma once

#include "types.cuh"

// 16 bytes: from `shared` if `is_shared`, else from `global` through L2. One predicate and no branch, so that many of
// them are under way at once.
__device__ __forceinline__ uint4 load_split(bool is_shared, uint32_t shared, const void* global) {
    uint4 value;
    asm("{\n.reg .pred p;\n"
        "setp.ne.u32 p, %4, 0;\n"
        "@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%5];\n"
        "@!p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%6];\n}"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "r"(static_cast<uint32_t>(is_shared)), "r"(shared), "l"(global)
        : "memory");
    return value;
}
