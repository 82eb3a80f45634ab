// One token for each row of logits: the likeliest, or a draw within temperature, top-k, min-p and top-p. A block a row.
//
// What top-k and top-p keep is "all keys from some edge on" (sample_cut.cuh): of equal logits the lower ids. Weights
// exp((logit - peak) / temperature) are integers in units of 2^-40, so the draw is exact. It goes through the kept tokens
// in ascending order of ids. A row that is no numbers has the token -1, and 0 as the one that a decoder may go on with.
//
// Macros: THREADS.
#include "sample_cut.cuh"

struct Draw {
  double position;    // in [0, 1)
  float temperature;  // 0: the likeliest token
  float top_p;        // 1: off
  float min_p;        // 0: off
  int top_k;          // 0: off
};

#define LARGEST 3.402823466e38f

// The token in whose share of the kept mass `position` falls: first the warp, whose tokens are neighbours, then among
// those the thread. For one thread of the block; -1 for all others.
__device__ __forceinline__ int find_token(const Row& row, Key edge, double position, Shared& shared) {
  const float edge_logit = logit_of(edge);
  const auto kept = [&](float logit, int token) {
    return is_from(edge, edge_logit, logit, token) ? row.weight(logit) : 0;
  };
  const int run = (row.vocab_size + WARPS * 4 - 1) / (WARPS * 4) * 4, warp = threadIdx.x / 32;
  const int own_end = min((warp + 1) * run, row.vocab_size);
  Mass mass = 0;
  if (row.vocab_size % 4 == 0) {
#pragma unroll 4
    for (int token = warp * run + threadIdx.x % 32 * 4; token < own_end; token += 128) {
      const float4 four = *reinterpret_cast<const float4*>(row.logits + token);
      mass += kept(four.x, token) + kept(four.y, token + 1) + kept(four.z, token + 2) + kept(four.w, token + 3);
    }
  } else {
    for (int token = warp * run + threadIdx.x % 32; token < own_end; token += 32) mass += kept(row.logits[token], token);
  }
  mass = warp_sum(mass);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.sums[warp] = mass;
  __syncthreads();
  Mass total = 0;
  for (int other = 0; other < WARPS; ++other) total += shared.sums[other];
  Mass place = static_cast<Mass>(position * static_cast<double>(total));
  if (place >= total) place = total - 1;
  int chosen = 0;
  while (place >= shared.sums[chosen]) place -= shared.sums[chosen++];

  const int own_run = (run + THREADS - 1) / THREADS, end = min((chosen + 1) * run, row.vocab_size);
  const int first = chosen * run + threadIdx.x * own_run;
  mass = 0;
  for (int token = first; token < min(first + own_run, end); ++token) mass += kept(row.logits[token], token);
  Mass start = block_sum_before(mass, total, shared);
  if (place < start || place >= start + mass) return -1;
  for (int token = first;; ++token) {
    start += kept(row.logits[token], token);
    if (place < start) return token;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sample_tokens(const float* __restrict__ logits, const int* __restrict__ rows, const Draw* __restrict__ draws,
                  long long* __restrict__ tokens, int* __restrict__ next_tokens, int vocab_size) {
  __shared__ Shared shared;
  const float* own = logits + static_cast<long long>(rows ? rows[blockIdx.x] : blockIdx.x) * vocab_size;
  float peak = -LARGEST * 2.0f, lowest = LARGEST;  // minus infinity, if there is nothing above it
  int first = 0, bad = 0;
  each_token<4>(own, vocab_size, [&](float logit, int token) {
    bad |= logit != logit;
    if (logit > peak) peak = logit, first = token;
    if (logit >= -LARGEST) lowest = fminf(lowest, logit);
  });
  const Key best = block_max(key_of(peak, first), shared);
  lowest = logit_of(~block_max(~key_of(lowest, 0), shared));
  const bool any_bad = block_sum({0, bad}, shared).count != 0;
  const int likeliest = static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
  peak = logit_of(best);
  const bool valid = !any_bad && fabsf(peak) <= LARGEST;
  const Draw draw = draws ? draws[blockIdx.x] : Draw{0.0, 0.0f, 1.0f, 0.0f, 0};
  if (!valid || draw.temperature == 0.0f) {
    if (threadIdx.x == 0) {
      tokens[blockIdx.x] = valid ? likeliest : -1;
      next_tokens[blockIdx.x] = valid ? likeliest : 0;
    }
    return;
  }

  const float rate = 1.4426950408889634f / draw.temperature;
  const Row row = {own, vocab_size, peak, rate, static_cast<Mass>(draw.min_p * UNIT)};
  Key edge = smallest_key();
  if (draw.top_k > 0 && draw.top_k < vocab_size) {
    const auto possible = [](float logit) { return Mass{logit >= -LARGEST}; };
    const auto wanted = [=](Mass total) { return total < draw.top_k ? total : draw.top_k; };
    edge = cut(row, edge, possible, wanted, lowest, shared);
  }
  if (draw.top_p < 1.0f) {
    const auto wanted = [=](Mass total) {
      const Mass mass = static_cast<Mass>(static_cast<double>(draw.top_p) * static_cast<double>(total));
      return mass > 0 ? mass : 1;
    };
    const float weighted = fmaxf(lowest, peak - LEAST_WEIGHT_BITS / rate);  // what is lower weighs nothing
    edge = cut(row, edge, [&](float logit) { return row.weight(logit); }, wanted, weighted, shared);
  }
  const int token = find_token(row, edge, draws[blockIdx.x].position, shared);
  if (token >= 0) tokens[blockIdx.x] = next_tokens[blockIdx.x] = token;
}
