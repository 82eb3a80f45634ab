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
};
