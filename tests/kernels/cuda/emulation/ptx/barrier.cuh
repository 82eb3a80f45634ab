// Emulated: barriers in shared memory by their addresses; threads that wait let the others run.
#pragma once

#include <map>

struct EmulatedBarrier {
  int expected = 0, pending = 0;
  long bytes = 0;
  unsigned phase = 0;
  void settle() {
    if (pending == 0 && bytes == 0) phase ^= 1, pending = expected;
  }
};
inline std::map<unsigned, EmulatedBarrier> emulated_barriers;
struct NamedBarrier {
  int arrived = 0;
  unsigned round = 0;
};
inline std::map<int, NamedBarrier> named_barriers;

inline unsigned char* shared_base() {
  return dynamic_memory.data() + -reinterpret_cast<uintptr_t>(dynamic_memory.data()) % 128;
}
inline unsigned shared_address(const void* pointer) {
  return unsigned(static_cast<const unsigned char*>(pointer) - shared_base());
}
inline void let_others_run() { swapcontext(&block.fibers[block.current].context, &block.scheduler); }

inline void fence_shared_to_async_proxy() {}
inline unsigned named_barrier_enter(int barrier, int threads) {
  NamedBarrier& state = named_barriers[barrier];
  const unsigned round = state.round;
  if (++state.arrived == threads) state.arrived = 0, ++state.round;
  return round;
}
inline void named_barrier_arrive(int barrier, int threads) { named_barrier_enter(barrier, threads); }
inline void named_barrier_sync(int barrier, int threads) {
  const unsigned round = named_barrier_enter(barrier, threads);
  while (named_barriers[barrier].round == round) let_others_run();
}
inline void mbarrier_init(unsigned barrier, unsigned arrivals) {
  emulated_barriers[barrier] = {int(arrivals), int(arrivals), 0, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(unsigned barrier) {
  EmulatedBarrier& state = emulated_barriers.at(barrier);
  --state.pending;
  state.settle();
}
inline void mbarrier_arrive_expect(unsigned barrier, unsigned bytes) {
  emulated_barriers.at(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
inline void mbarrier_complete(unsigned barrier, unsigned bytes) {
  emulated_barriers.at(barrier).bytes -= bytes;
  emulated_barriers.at(barrier).settle();
}
inline void mbarrier_arrive_remote(unsigned barrier, unsigned) { mbarrier_arrive(barrier); }
inline void mbarrier_wait(unsigned barrier, unsigned parity) {
  while (emulated_barriers.at(barrier).phase == parity) let_others_run();
}
