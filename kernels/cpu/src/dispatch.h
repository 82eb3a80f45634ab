// The entry points of one instruction set's build.
#pragma once

#include "abi.h"

struct AqKernels {
  const char* name;
  int64_t (*linear_workspace)(const AqLinear*, int64_t, int32_t);
  void (*linear)(const AqLinear*, const float*, int64_t, float*, void*, int32_t);
  int64_t (*decoder_workspace)(const AqDecoder*, const AqBatch*, int32_t);
  void (*decoder_forward)(const AqDecoder*, const AqBatch*, float*, void*, int32_t);
  void (*attention)(const AqDecoder*, const AqBatch*, const float*, float*, void*, int32_t);
  void (*store)(const AqDecoder*, const AqBatch*, const float*, const float*);
  void (*unpack)(const uint32_t*, int64_t, int64_t, int64_t, int32_t, uint8_t*);
  void (*unpack_across)(const uint32_t*, int64_t, int64_t, int32_t, uint8_t*);
  void (*unpack_awq)(const uint32_t*, int64_t, int64_t, uint8_t*);
  int32_t (*pack)(const uint8_t*, int64_t, int64_t, int32_t, uint32_t*);
  int32_t (*pack_across)(const uint8_t*, int64_t, int64_t, int32_t, uint32_t*);
  int32_t (*pack_awq)(const uint8_t*, int64_t, int64_t, uint32_t*);
  uint32_t (*largest_masked)(const void*, int64_t, int32_t, uint32_t);
  int32_t (*round_integers)(AqRounding*);
  void (*round_float8)(AqFloat8Rounding*);
};
