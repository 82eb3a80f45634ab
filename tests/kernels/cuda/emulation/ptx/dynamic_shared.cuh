// Emulated: the block's dynamic shared memory.
#pragma once

inline unsigned char* dynamic_shared() {
  return dynamic_memory.data() + -reinterpret_cast<uintptr_t>(dynamic_memory.data()) % 128;
}
