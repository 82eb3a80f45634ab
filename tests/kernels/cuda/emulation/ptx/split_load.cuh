// Emulated: a branch.
#pragma once

#include "ptx/barrier.cuh"

inline uint4 load_split(bool is_shared, unsigned shared, const void* global) {
  uint4 value;
  std::memcpy(&value, is_shared ? shared_base() + shared : global, 16);
  return value;
}
