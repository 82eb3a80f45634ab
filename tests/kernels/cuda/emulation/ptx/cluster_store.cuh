// Emulated: clusters of one block.
#pragma once

#include "ptx/barrier.cuh"

inline void cluster_store(unsigned mapped, float value) { std::memcpy(shared_base() + mapped, &value, 4); }
