// cp.async: copies from global to shared memory that pass no register, in groups that complete in order.
#pragma once

// Copies BYTES (4, 8 or 16); zeros where `valid` is false, and then `source` is not read. With a LINE of
// 128 bytes, L2 may fetch all of the one around it.
template <int BYTES, int LINE = 0>
__device__ __forceinline__ void copy_async(void* shared, const void* source, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async can move");
  static_assert(LINE == 0 || LINE == 128, "what is written here");
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int size = valid ? BYTES : 0;
  if (BYTES == 16 && LINE == 128) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(size)
                 : "memory");
  } else if (BYTES == 16) {  // only this width may bypass L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source), "n"(BYTES), "r"(size)
                 : "memory");
  }
}

// Closes the group of this thread's copies since the last one.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are incomplete.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
