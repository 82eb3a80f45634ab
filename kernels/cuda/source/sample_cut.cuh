// Where to cut a row of logits: the edge from which on the fewest tokens have an amount that is wanted.
//
// Tokens are ordered by (logit, lower id first) as one 64-bit key, so that no two are equal and ties need no care. Their
// amounts (1 for top-k, weights for top-p) are integers, so that any order of additions gives the same sum. One pass
// gathers the amounts of the row in bins of equal width, from the peak downwards; the bin where the sum reaches what is
// wanted is copied to shared memory and searched there. Too many tokens for that, of equal logits say, are binned again
// by their keys.
#pragma once

#include "ptx/exponential.cuh"

#ifndef THREADS
#define THREADS 1024
#endif

typedef unsigned long long Mass;
typedef unsigned long long Key;

#define ALL_LANES 0xffffffffu
constexpr int WARPS = THREADS / 32;
constexpr int BINS = 2048;
constexpr int CUT_BATCH = 4;  // loads of a thread at once
constexpr int MAX_LISTED = 2048;
constexpr float UNIT = 1099511627776.0f;  // 2^40: weights are in units of 2^-40
constexpr float LEAST_WEIGHT_BITS = 41.0f;
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps");

__device__ __forceinline__ Key key_of(float logit, int token) {
  const unsigned bits = __float_as_uint(logit + 0.0f);  // of both zeros the positive one
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(token));
}

__device__ __forceinline__ float logit_of(Key key) {
  const unsigned ordered = static_cast<unsigned>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// The smallest key of a number.
__device__ __forceinline__ Key smallest_key() { return key_of(__int_as_float(0xff800000), 0x7fffffff); }

// Whether a token's key is from `edge` on, whose logit is `edge_logit`: the ids hardly ever matter.
__device__ __forceinline__ bool is_from(Key edge, float edge_logit, float logit, int token) {
  return logit > edge_logit || (logit == edge_logit && key_of(logit, token) >= edge);
}

struct Tally {
  Mass mass;
  int count;
};

// What the threads of a block share.
struct Shared {
  unsigned low[BINS], high[BINS];  // halves of each bin's sum
  Key listed[MAX_LISTED];
  Tally tallies[WARPS];
  Key keys[WARPS];
  Mass sums[WARPS];
  Mass before;
  int bin;
  int num_listed;
};

__device__ __forceinline__ Mass warp_sum(Mass value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
  return value;
}

// The sum over the block, for every thread.
__device__ __forceinline__ Tally block_sum(Tally own, Shared& shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    own.mass += __shfl_xor_sync(ALL_LANES, own.mass, offset);
    own.count += __shfl_xor_sync(ALL_LANES, own.count, offset);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.tallies[threadIdx.x / 32] = own;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  Tally total = {0, 0};
  if (lane < WARPS) total = shared.tallies[lane];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    total.mass += __shfl_xor_sync(ALL_LANES, total.mass, offset);
    total.count += __shfl_xor_sync(ALL_LANES, total.count, offset);
  }
  return total;
}

__device__ __forceinline__ Key block_max(Key own, Shared& shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Key other = __shfl_xor_sync(ALL_LANES, own, offset);
    own = own > other ? own : other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.keys[threadIdx.x / 32] = own;
  __syncthreads();
  Key largest = threadIdx.x % 32 < WARPS ? shared.keys[threadIdx.x % 32] : 0;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Key other = __shfl_xor_sync(ALL_LANES, largest, offset);
    largest = largest > other ? largest : other;
  }
  return largest;
}

// The sum over the threads in front of this one, and over all.
__device__ __forceinline__ Mass block_sum_before(Mass own, Mass& total, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Mass sum = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Mass other = __shfl_up_sync(ALL_LANES, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();
  if (lane == 31) shared.sums[warp] = sum;
  __syncthreads();
  const Mass own_warps = lane < WARPS ? shared.sums[lane] : 0;
  total = warp_sum(own_warps);
  return sum - own + warp_sum(lane < warp ? own_warps : 0);
}

// visit(logit, token) for this thread's share of a row, 16 bytes at a time where the row is aligned. BATCH of them are on
// their way at once: a single one leaves the memory idle.
template <int BATCH, typename Visit>
__device__ __forceinline__ void each_token(const float* logits, int vocab_size, Visit visit) {
  const int whole = vocab_size % 4 == 0 ? vocab_size : 0;
#pragma unroll 1
  for (int first = threadIdx.x * 4; first < whole; first += BATCH * THREADS * 4) {
    float4 fours[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int token = first + i * THREADS * 4;
      if (token < whole) fours[i] = *reinterpret_cast<const float4*>(logits + token);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int token = first + i * THREADS * 4;
      if (token >= whole) break;
      visit(fours[i].x, token);
      visit(fours[i].y, token + 1);
      visit(fours[i].z, token + 2);
      visit(fours[i].w, token + 3);
    }
  }
#pragma unroll 1
  for (int token = whole + threadIdx.x; token < vocab_size; token += THREADS) visit(logits[token], token);
}

struct Row {
  const float* logits;
  int vocab_size;
  float peak;
  float rate;  // weight = 2^((logit - peak) * rate)
  Mass least;  // weights below it are dropped: min-p

  __device__ __forceinline__ Mass weight(float logit) const {
    const Mass mass = static_cast<Mass>(power_of_two((logit - peak) * rate) * UNIT);
    return mass >= least ? mass : 0;
  }
};

// A range of keys in bins, the largest keys first: of equal width in the logits, or in the keys.
struct Binning {
  Key low, high;  // keys from low on, below high; by logits: high is above all keys
  float low_logit, peak, per_unit;
  int shift;  // of keys; negative: by logits

  __device__ __forceinline__ static Binning by_logits(Key low, Key high, float peak, float lowest) {
    const float extent = __fsub_rn(peak, lowest);
    const float per_unit = extent > 0.0f && extent <= 3.402823466e38f ? __fdiv_rn(BINS - 1, extent) : 0.0f;
    return {low, high, logit_of(low), peak, per_unit, -1};
  }
  __device__ __forceinline__ static Binning by_keys(Key low, Key high) {
    int shift = 0;
    while ((high - 1 - low) >> shift >= BINS) ++shift;
    return {low, high, 0.0f, 0.0f, 0.0f, shift};
  }

  __device__ __forceinline__ bool holds(float logit, int token) const {
    if (shift < 0) return is_from(low, low_logit, logit, token);
    const Key key = key_of(logit, token);
    return key >= low && key < high;
  }

  // Every operation is monotonic, so that a bin is a range of keys whatever rounding does.
  __device__ __forceinline__ float place(float logit) const { return __fmul_rn(__fsub_rn(peak, logit), per_unit); }
  __device__ __forceinline__ int bin(float logit, int token) const {
    if (shift >= 0) return static_cast<int>((high - 1 - key_of(logit, token)) >> shift);
    const float own = place(logit);
    return own < BINS - 1 ? static_cast<int>(own) : own >= BINS - 1 ? BINS - 1 : 0;  // infinity times 0: all in bin 0
  }
};

// A quick look at whether a logit may be in a bin. NaN bounds exclude nothing.
struct BinBounds {
  const Binning& binning;
  float begin, end;

  __device__ __forceinline__ BinBounds(const Binning& own, int bin)
      : binning(own),
        begin(own.shift >= 0 || bin == 0 ? __int_as_float(0x7fffffff) : static_cast<float>(bin)),
        end(own.shift >= 0 || bin == BINS - 1 ? __int_as_float(0x7fffffff) : static_cast<float>(bin + 1)) {}
  __device__ __forceinline__ bool may_hold(float logit) const {
    const float place = binning.place(logit);
    return !(place < begin) && !(place >= end);
  }
};

// The exact sum in two halves; a carry shows in the value that was there before.
__device__ __forceinline__ void add_to_bin(Shared& shared, int bin, Mass amount) {
  const unsigned low = static_cast<unsigned>(amount);
  unsigned high = static_cast<unsigned>(amount >> 32);
  const unsigned before = atomicAdd(&shared.low[bin], low);
  high += before + low < before;
  if (high) atomicAdd(&shared.high[bin], high);
}

// Finds the first bin where the amounts from the top reach `wanted(total)`: shared.bin, and the sum in front of it.
template <typename Wanted>
__device__ __forceinline__ Mass find_bin(Shared& shared, const Wanted& wanted, Mass above, Mass& goal) {
  constexpr int OWN = (BINS + THREADS - 1) / THREADS;
  Mass own = 0, total;
  const int first = threadIdx.x * OWN;
  for (int bin = first; bin < first + OWN && bin < BINS; ++bin)
    own += static_cast<Mass>(shared.high[bin]) << 32 | shared.low[bin];
  Mass before = above + block_sum_before(own, total, shared);
  goal = wanted(above + total);
  if (before < goal && before + own >= goal) {
    int bin = first;
    for (;; ++bin) {
      const Mass amount = static_cast<Mass>(shared.high[bin]) << 32 | shared.low[bin];
      if (before + amount >= goal) break;
      before += amount;
    }
    shared.bin = bin;
    shared.before = before;
  }
  __syncthreads();
  return shared.before;
}

// The edge among the listed keys: those from it on, with `above`, are the fewest that reach `goal`.
template <typename Amount>
__device__ __forceinline__ Key cut_list(Shared& shared, const Amount& amount, Key low, Key high, Mass above, Mass goal) {
  const int size = shared.num_listed;
  int from_low = size, from_high = 0;  // tokens
  while (from_low - from_high > 1 && high - low > 1) {
    const Key middle = low + (high - low) / 2;
    Tally own = {0, 0};
    for (int index = threadIdx.x; index < size; index += THREADS) {
      const Key key = shared.listed[index];
      if (key >= middle) own.mass += amount(logit_of(key)), own.count += 1;
    }
    const Tally tally = block_sum(own, shared);
    if (above + tally.mass >= goal) {
      low = middle, from_low = tally.count;
    } else {
      high = middle, from_high = tally.count;
    }
  }
  return low;
}

// The edge from which on the fewest tokens have an amount of `wanted(total)`, between 1 and the total, which is that of
// all tokens from `low` on. amount(logit) is monotonic; tokens whose amount is 0 do not matter.
template <typename Amount, typename Wanted>
__device__ __forceinline__ Key cut(const Row& row, Key low, const Amount& amount, const Wanted& wanted, float lowest,
                                   Shared& shared) {
  Binning binning = Binning::by_logits(low, key_of(row.peak, 0) + 1, row.peak, lowest);
  Mass above = 0, goal = 0;
  for (;;) {
    __syncthreads();  // what was found before has been read
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) shared.low[bin] = shared.high[bin] = 0;
    if (threadIdx.x == 0) shared.num_listed = 0;
    __syncthreads();
    each_token<CUT_BATCH>(row.logits, row.vocab_size, [&](float logit, int token) {
      if (!binning.holds(logit, token)) return;
      if (const Mass own = amount(logit)) add_to_bin(shared, binning.bin(logit, token), own);
    });
    __syncthreads();
    above = goal == 0 ? find_bin(shared, wanted, above, goal)
                      : find_bin(shared, [goal](Mass) { return goal; }, above, goal);
    const int bin = shared.bin;
    const BinBounds bounds(binning, bin);
    Key largest = 0, smallest_inverse = 0;
    each_token<CUT_BATCH>(row.logits, row.vocab_size, [&](float logit, int token) {
      if (!bounds.may_hold(logit) || !binning.holds(logit, token) || binning.bin(logit, token) != bin) return;
      if (!amount(logit)) return;
      const Key key = key_of(logit, token);
      if (shared.num_listed <= MAX_LISTED) {  // else there are too many already
        const int index = atomicAdd(&shared.num_listed, 1);
        if (index < MAX_LISTED) shared.listed[index] = key;
      }
      largest = largest > key ? largest : key;
      smallest_inverse = smallest_inverse > ~key ? smallest_inverse : ~key;
    });
    const Key high_key = block_max(largest, shared) + 1;
    const Key low_key = ~block_max(smallest_inverse, shared);
    if (shared.num_listed <= MAX_LISTED) return cut_list(shared, amount, low_key, high_key, above, goal);
    binning = Binning::by_keys(low_key, high_key);
  }
}
