// A CUDA block on a processor: one fiber a thread, which switch where threads of a block or a warp meet.
//
// Kernels are compiled as they are, with the headers of ptx/ beside this file in place of those that hold inline
// assembly. Blocks run one after another. What lanes exchange goes through per-warp slots between two meetings of the
// warp, so that index errors show as wrong numbers, divergent meetings as an error, and wild addresses to the sanitizer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#undef __grid_constant__
#define __grid_constant__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static

using std::max;
using std::min;

struct Index {
  unsigned x, y, z;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;
inline std::vector<unsigned char> dynamic_memory;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int waits_for = 0;  // 0: nothing, 1: its warp, 2: its block
};

struct Block {
  static constexpr size_t STACK = 256 * 1024;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  size_t current = 0;
  std::function<void()> body;
  struct Slot {
    alignas(16) unsigned char bytes[64];
  };
  std::vector<Slot> slots;

  void run(unsigned num_threads, std::function<void()> kernel) {
    body = std::move(kernel);
    fibers.clear();
    fibers.resize(num_threads);
    slots.assign(num_threads, Slot{});
    for (auto& fiber : fibers) {
      getcontext(&fiber.context);
      fiber.stack.reset(new char[STACK]);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    while (advance()) {
    }
  }

  // Runs every fiber up to its next meeting, then lets go those whose meeting is complete. False when all are done.
  bool advance() {
    bool any = false, moved = false;
    for (current = 0; current < fibers.size(); ++current) {
      Fiber& fiber = fibers[current];
      if (fiber.done) continue;
      any = true;
      if (fiber.waits_for) continue;
      threadIdx = {unsigned(current), 0, 0};
      moved = true;
      swapcontext(&scheduler, &fiber.context);
    }
    for (size_t first = 0; first < fibers.size(); first += 32)
      moved |= release(first, std::min(first + 32, fibers.size()), 1);
    moved |= release(0, fibers.size(), 2);
    if (any && !moved) {
      std::fprintf(stderr, "threads of a block wait for each other at different places\n");
      std::abort();
    }
    return any;
  }

  bool release(size_t first, size_t end, int kind) {
    size_t waiting = 0, alive = 0;
    for (size_t i = first; i < end; ++i) {
      alive += !fibers[i].done;
      waiting += !fibers[i].done && fibers[i].waits_for == kind;
    }
    if (!waiting || waiting < alive) return false;
    for (size_t i = first; i < end; ++i) fibers[i].waits_for = 0;
    return true;
  }

  void meet(int kind) {
    fibers[current].waits_for = kind;
    swapcontext(&fibers[current].context, &scheduler);
  }

  static void enter();
};
inline Block block;
inline void Block::enter() {
  block.body();
  block.fibers[block.current].done = true;
}

inline void __syncthreads() { block.meet(2); }
inline void __syncwarp(unsigned = 0xffffffffu) { block.meet(1); }
inline void __threadfence() {}

// What every lane of the warp has put in.
template <typename T>
inline std::vector<T> exchange(const T& mine) {
  static_assert(sizeof(T) <= sizeof(Block::Slot));
  std::memcpy(block.slots[block.current].bytes, &mine, sizeof(T));
  block.meet(1);
  const size_t first = block.current / 32 * 32;
  std::vector<T> all(32);
  for (size_t lane = 0; lane < 32 && first + lane < block.slots.size(); ++lane)
    std::memcpy(&all[lane], block.slots[first + lane].bytes, sizeof(T));
  block.meet(1);
  return all;
}

inline int lane_id() { return int(block.current % 32); }
template <typename T>
inline T __shfl_sync(unsigned, T value, int source) {
  return exchange(value)[source % 32];
}
template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return exchange(value)[lane_id() ^ mask];
}
template <typename T>
inline T __shfl_up_sync(unsigned, T value, int distance) {
  return exchange(value)[std::max(lane_id() - distance, 0)];
}
inline unsigned __match_any_sync(unsigned, int value) {
  const auto all = exchange(value);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) same |= unsigned(all[lane] == value) << lane;
  return same;
}
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __any_sync(unsigned, int predicate) {
  for (int other : exchange(predicate))
    if (other) return 1;
  return 0;
}

inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __int_as_float(unsigned bits) { return __uint_as_float(bits); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
template <typename T>
inline T __ldcg(const T* address) {
  return *address;
}
template <typename T>
inline void __stcg(T* address, T value) {
  *address = value;
}
template <typename T>
inline T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

// Runs a kernel over a grid.
template <typename Kernel>
inline void launch(Index grid, unsigned num_threads, size_t shared_bytes, Kernel kernel) {
  gridDim = grid;
  blockDim = {num_threads, 1, 1};
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        dynamic_memory.assign(shared_bytes + 128, 0xff);  // NaN as float, bf16, fp16 and FP8
        block.run(num_threads, kernel);
      }
}
