// One token for each row of logits: the likeliest, or a draw within temperature, top-k, min-p and top-p. A block a row.
//
// Tokens are ordered by (logit, lower id first) as one 64-bit key, so that no two are equal and ties need no care: what
// top-k and top-p keep is "all keys from some edge on", and the edge is found by halving the range of keys. Weights
// exp((logit - peak) / temperature) are summed as integers in units of 2^-40: any order of additions gives the same sum,
// and the draw is exact. The draw goes through the kept tokens in ascending order of ids.
//
// Macros: THREADS.
#include "ptx/exponential.cuh"

#ifndef THREADS
#define THREADS 1024
#endif

typedef unsigned long long Mass;
typedef unsigned long long Key;

#define ALL_LANES 0xffffffffu
constexpr int WARPS = THREADS / 32;
constexpr float UNIT = 1099511627776.0f;  // 2^40
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps");

struct Draw {
  double position;    // in [0, 1)
  float temperature;  // 0: the likeliest token
  float top_p;        // 1: off
  float min_p;        // 0: off
  int top_k;          // 0: off
};

struct Tally {
  Mass mass;
  int count;
};

__device__ __forceinline__ Tally operator+(Tally a, Tally b) { return {a.mass + b.mass, a.count + b.count}; }

__device__ __forceinline__ Key key_of(float logit, int token) {
  const unsigned bits = __float_as_uint(logit);
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(token));
}

// The sum over the block, for every thread. `scratch` may be used again after another barrier.
__device__ __forceinline__ Tally block_sum(Tally own, Tally* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    own.mass += __shfl_xor_sync(ALL_LANES, own.mass, offset);
    own.count += __shfl_xor_sync(ALL_LANES, own.count, offset);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = own;
  __syncthreads();
  Tally total = {0, 0};
  for (int warp = 0; warp < WARPS; ++warp) total = total + scratch[warp];
  return total;
}

__device__ __forceinline__ Key block_max(Key own, Key* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Key other = __shfl_xor_sync(ALL_LANES, own, offset);
    own = own > other ? own : other;
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = own;
  __syncthreads();
  Key largest = 0;
  for (int warp = 0; warp < WARPS; ++warp) largest = largest > scratch[warp] ? largest : scratch[warp];
  return largest;
}

// visit(logit, token) for this thread's share of a row, 16 bytes at a time where the row is aligned.
template <typename Visit>
__device__ __forceinline__ void each_token(const float* logits, int vocab_size, Visit visit) {
  const int whole = vocab_size % 4 == 0 ? vocab_size : 0;
#pragma unroll 4
  for (int token = threadIdx.x * 4; token < whole; token += THREADS * 4) {
    const float4 four = *reinterpret_cast<const float4*>(logits + token);
    visit(four.x, token);
    visit(four.y, token + 1);
    visit(four.z, token + 2);
    visit(four.w, token + 3);
  }
  for (int token = whole + threadIdx.x; token < vocab_size; token += THREADS) visit(logits[token], token);
}

struct Row {
  const float* logits;
  int vocab_size;
  float peak, rate;  // weight = 2^((logit - peak) * rate)
  Mass least;        // weights below it are dropped: min-p

  __device__ __forceinline__ Mass weight(float logit) const {
    const Mass mass = static_cast<Mass>(power_of_two((logit - peak) * rate) * UNIT);
    return mass >= least ? mass : 0;
  }

  // Mass and number of the tokens with keys from `edge` on.
  __device__ __forceinline__ Tally from(Key edge, Tally* scratch) const {
    Tally own = {0, 0};
    each_token(logits, vocab_size, [&](float logit, int token) {
      if (key_of(logit, token) >= edge) {
        own.mass += weight(logit);
        own.count += 1;
      }
    });
    return block_sum(own, scratch);
  }

  // The edge from which on the fewest tokens satisfy `enough`; those from `low` on do, and enough(nothing) is false.
  template <typename Enough>
  __device__ __forceinline__ Key edge(Key low, Tally low_tally, Enough enough, Tally* scratch) const {
    Key high = key_of(peak, 0) + 1;
    int above = 0;  // tokens from `high` on
    while (low_tally.count - above > 1 && high - low > 1) {
      const Key middle = low + (high - low) / 2;
      const Tally tally = from(middle, scratch);
      if (enough(tally)) {
        low = middle;
        low_tally = tally;
      } else {
        high = middle;
        above = tally.count;
      }
    }
    return low;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    sample_tokens(const float* __restrict__ logits, const int* __restrict__ rows, const Draw* __restrict__ draws,
                  long long* __restrict__ tokens, int vocab_size) {
  __shared__ Tally tallies[WARPS];
  __shared__ Key keys[WARPS];
  __shared__ Mass before[THREADS];
  const float* own = logits + static_cast<long long>(rows ? rows[blockIdx.x] : blockIdx.x) * vocab_size;
  Key best = 0;
  Tally bad = {0, 0};
  each_token(own, vocab_size, [&](float logit, int token) {
    if (logit != logit) bad.count = 1;
    const Key key = key_of(logit, token);
    best = best > key ? best : key;
  });
  best = block_max(best, keys);
  bad = block_sum(bad, tallies);
  const int likeliest = static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
  const float peak = own[likeliest];
  const bool valid = bad.count == 0 && fabsf(peak) <= 3.402823466e38f;
  const Draw draw = draws ? draws[blockIdx.x] : Draw{0.0, 0.0f, 1.0f, 0.0f, 0};
  if (!valid || draw.temperature == 0.0f) {
    if (threadIdx.x == 0) tokens[blockIdx.x] = valid ? likeliest : -1;
    return;
  }

  const float rate = 1.4426950408889634f / draw.temperature;
  const Row row = {own, vocab_size, peak, rate, static_cast<Mass>(draw.min_p * UNIT)};
  Key edge = 0;
  Tally kept = row.from(edge, tallies);
  if (draw.top_k > 0 && draw.top_k < vocab_size) {
    const int wanted = draw.top_k;
    edge = row.edge(edge, kept, [=](Tally tally) { return tally.count >= wanted; }, tallies);
    kept = row.from(edge, tallies);
  }
  if (draw.top_p < 1.0f) {
    const Mass wanted = static_cast<Mass>(static_cast<double>(draw.top_p) * static_cast<double>(kept.mass));
    edge = row.edge(edge, kept, [=](Tally tally) { return tally.mass >= wanted && tally.count > 0; }, tallies);
    kept = row.from(edge, tallies);
  }

  // Each thread has a run of neighbouring ids; the one whose run the position falls into finds the token.
  Mass position = static_cast<Mass>(draw.position * static_cast<double>(kept.mass));
  if (position >= kept.mass) position = kept.mass - 1;
  const int run = (vocab_size + THREADS - 1) / THREADS;
  const int first = min(static_cast<int>(threadIdx.x) * run, vocab_size), end = min(first + run, vocab_size);
  Mass mass = 0;
  for (int token = first; token < end; ++token)
    if (key_of(own[token], token) >= edge) mass += row.weight(own[token]);
  before[threadIdx.x] = mass;
  __syncthreads();
  Mass start = 0;
  for (int other = 0; other < static_cast<int>(threadIdx.x); ++other) start += before[other];
  if (position < start || position >= start + mass) return;
  for (int token = first; token < end; ++token) {
    if (key_of(own[token], token) < edge) continue;
    start += row.weight(own[token]);
    if (position < start) {
      tokens[blockIdx.x] = token;
      return;
    }
  }
}
