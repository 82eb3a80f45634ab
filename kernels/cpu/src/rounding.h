// Rounding a weight to nearest from its own range: integers with a scale (and zero point) a group, and e4m3 with a scale a
// block. Bit for bit what aphroquant/calibration (integer_grid.py, fp8.py) does in torch: every step is one float32
// operation, in the same order.
#pragma once

#include <float.h>

#include "abi.h"
#include "numbers.h"

namespace AQ_NAMESPACE {

constexpr int64_t kRun = 256;  // numbers at a time

// Numbers index .. index + count - 1 as floats, filled up with zeros to a multiple of 16.
static inline void load_floats(const void* numbers, int32_t type, int64_t index, int64_t count, float* y) {
  const int64_t whole = count / 16 * 16;
  const float* wide = static_cast<const float*>(numbers) + index;
  const uint16_t* half = static_cast<const uint16_t*>(numbers) + index;
  if (type == AQ_F32) {
    memcpy(y, wide, static_cast<size_t>(count) * 4);
  } else {
    for (int64_t i = 0; i < whole; i += 16) store(y + i, type == AQ_F16 ? load_f16(half + i) : load_bf16(half + i));
    if (whole < count) {
      uint16_t rest[16] = {};
      memcpy(rest, half + whole, static_cast<size_t>(count - whole) * 2);
      store(y + whole, type == AQ_F16 ? load_f16(rest) : load_bf16(rest));
    }
  }
  if (type == AQ_F32 && whole < count) memset(y + count, 0, static_cast<size_t>(whole + 16 - count) * 4);
}

// A number of at least zero, of either sign, as the stored dtype holds it: 1 for zero, infinite for what does not fit.
static inline float stored_scale(float scale, int32_t type, void* scales, int64_t index) {
  scale = scale > 0.0f ? scale : 0.0f;
  if (type == AQ_F32) {
    scale = scale == 0.0f ? 1.0f : scale;
    static_cast<float*>(scales)[index] = scale;
    return scale;
  }
  uint16_t code = type == AQ_F16 ? to_f16(scale) : to_bf16(scale);
  if (code == 0) code = type == AQ_F16 ? 0x3c00 : 0x3f80;
  static_cast<uint16_t*>(scales)[index] = code;
  if (type == AQ_BF16) return float_of(static_cast<uint32_t>(code) << 16);
  if (code >= 0x7c00) return __builtin_inff();
  return code < 0x400 ? code * 5.9604644775390625e-8f : float_of((static_cast<uint32_t>(code) << 13) + (112u << 23));
}

struct Range {
  F32 low, high;
};

static inline Range widened(Range range, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    range.low = min(range.low, load(x + i));
    range.high = max(range.high, load(x + i));
  }
  return range;
}

static inline float smallest(F32 x) { return -largest(sub(zero(), x)); }
static inline float first_lane(F32 x) {
  float lanes[16];
  store(lanes, x);
  return lanes[0];
}

struct Squares {
  double error, total;
};

// Codes of one run, its last lanes possibly beyond `count`; adds to the squares of errors and of numbers.
static inline void round_run(const float* x, int64_t count, F32 scale, F32 zero_point, F32 levels, uint8_t* codes,
                             Squares* squares) {
  F32 error = zero(), total = zero();
  for (int64_t i = 0; i < count; i += 16) {
    const F32 value = load(x + i);
    const F32 code = min(max(round(add(div(value, scale), zero_point)), zero()), levels);
    const F32 off = sub(value, mul(sub(code, zero_point), scale));
    error = add(error, mul(off, off));
    total = add(total, mul(value, value));
    if (i + 16 <= count) {
      store_u8(codes + i, to_nearest_int(code));
    } else {
      uint8_t rest[16];
      store_u8(rest, to_nearest_int(code));
      memcpy(codes + i, rest, static_cast<size_t>(count - i));
    }
  }
  squares->error += sum(error);
  squares->total += sum(total);
}

// 0, or 1 if a scale does not fit its dtype.
static int32_t round_integers(AqRounding* job) {
  alignas(64) float x[kRun];
  Squares squares = {0.0, 0.0};
  const int64_t columns = job->columns, size = job->group_size, groups = (columns + size - 1) / size;
  const float levels = static_cast<float>((1 << job->bits) - 1), half = static_cast<float>(1 << (job->bits - 1));
  for (int64_t row = 0; row < job->rows; row++) {
    for (int64_t group = 0; group < groups; group++) {
      const int64_t begin = row * columns + group * size, count = min64(size, columns - group * size);
      Range range = {zero(), zero()};
      for (int64_t i = 0; i < count; i += kRun) {
        const int64_t part = min64(kRun, count - i);
        load_floats(job->weight, job->weight_type, begin + i, part, x);
        range = widened(range, x, part);
      }
      const float low = smallest(range.low), high = largest(range.high);
      const float reach = -low > high ? -low : high;
      const float wanted = job->symmetric ? reach / (half - 0.5f) : (high - low) / levels;
      const float scale = stored_scale(wanted, job->scale_type, job->scales, row * groups + group);
      if (!(scale <= FLT_MAX)) return 1;
      float zero_point = half;
      if (!job->symmetric) {
        const F32 rounded = round(div(broadcast(-low), broadcast(scale)));
        zero_point = first_lane(min(max(rounded, zero()), broadcast(levels)));
        job->zeros[row * groups + group] = static_cast<uint8_t>(zero_point);
      }
      for (int64_t i = 0; i < count; i += kRun) {
        const int64_t part = min64(kRun, count - i);
        if (count > kRun) load_floats(job->weight, job->weight_type, begin + i, part, x);
        round_run(x, part, broadcast(scale), broadcast(zero_point), broadcast(levels), job->codes + begin + i, &squares);
      }
    }
  }
  job->error = squares.error;
  job->total = squares.total;
  return 0;
}

static inline float largest_in_block(const AqFloat8Rounding& job, int64_t row, int64_t rows, int64_t column,
                                     int64_t columns) {
  alignas(64) float x[kRun];
  I32 top = zero_int();
  for (int64_t r = row; r < row + rows; r++) {
    for (int64_t i = 0; i < columns; i += kRun) {
      const int64_t part = min64(kRun, columns - i);
      load_floats(job.weight, job.weight_type, r * job.columns + column + i, part, x);
      for (int64_t k = 0; k < part; k += 16) top = max(top, magnitude_bits(load(x + k)));
    }
  }
  return float_of(static_cast<uint32_t>(largest(top)));
}

static inline void round_run_to_float8(const float* x, int64_t count, float scale, uint8_t* codes, Squares* squares) {
  alignas(64) float quotient[kRun];
  F32 error = zero(), total = zero();
  for (int64_t i = 0; i < count; i += 16) {
    const F32 inside = max(min(div(load(x + i), broadcast(scale)), broadcast(kLargestFp8)), broadcast(-kLargestFp8));
    store(quotient + i, inside);
  }
  for (int64_t i = 0; i < count; i++) codes[i] = to_fp8(quotient[i]);
  const int64_t lanes = round_up(count, 16);
  for (int64_t i = 0; i < lanes; i++) quotient[i] = nearest_fp8(quotient[i]);
  for (int64_t i = 0; i < count; i += 16) {
    const F32 value = load(x + i), off = sub(value, mul(load(quotient + i), broadcast(scale)));
    error = add(error, mul(off, off));
    total = add(total, mul(value, value));
  }
  squares->error += sum(error);
  squares->total += sum(total);
}

static void round_float8(AqFloat8Rounding* job) {
  alignas(64) float x[kRun];
  Squares squares = {0.0, 0.0};
  const int64_t grid = (job->columns + job->block_columns - 1) / job->block_columns;
  for (int64_t row = 0; row < job->rows; row += job->block_rows) {
    const int64_t rows = min64(job->block_rows, job->rows - row);
    for (int64_t column = 0; column < job->columns; column += job->block_columns) {
      const int64_t columns = min64(job->block_columns, job->columns - column);
      float* place = job->scales + row / job->block_rows * grid + column / job->block_columns;
      if (!job->scales_given) {
        const float scale = largest_in_block(*job, row, rows, column, columns) / kLargestFp8;
        *place = scale < FLT_MIN ? 1.0f : scale;
      }
      for (int64_t r = row; r < row + rows; r++) {
        for (int64_t i = 0; i < columns; i += kRun) {
          const int64_t part = min64(kRun, columns - i), begin = r * job->columns + column + i;
          load_floats(job->weight, job->weight_type, begin, part, x);
          round_run_to_float8(x, part, *place, job->codes + begin, &squares);
        }
      }
    }
  }
  job->error = squares.error;
  job->total = squares.total;
}

}  // namespace AQ_NAMESPACE
