// A team of threads inside one parallel region: barriers and shares of work.
#pragma once

#include <sched.h>

#include "simd.h"

namespace AQ_NAMESPACE {

struct Barrier {
  alignas(64) int32_t arrived;
  alignas(64) int32_t generation;
};

struct Team {
  int32_t index, size;
  Barrier* barrier;

  // Waits spin, for a forward has hundreds of barriers a few microseconds apart; after a while they give the core away.
  void wait() const {
    if (size == 1) return;
    const int32_t generation = __atomic_load_n(&barrier->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&barrier->generation, generation + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&barrier->generation, __ATOMIC_ACQUIRE) == generation; spins++) {
      if (spins < 4000) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

  // This thread's share [first, last) of `count` equal tasks.
  int64_t first(int64_t count) const { return count * index / size; }
  int64_t last(int64_t count) const { return count * (index + 1) / size; }
};

}  // namespace AQ_NAMESPACE
