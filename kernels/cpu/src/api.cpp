// The exported functions: each calls the build for the chosen instruction set.
#include <string.h>

#include "dispatch.h"

namespace baseline {
extern const AqKernels kernels;
}
#ifdef AQ_X86
namespace avx2 {
extern const AqKernels kernels;
}
namespace avx512 {
extern const AqKernels kernels;
}
#endif

namespace {

bool runs(const AqKernels& kernels) {
#ifdef AQ_X86
  __builtin_cpu_init();
  if (&kernels == &avx512::kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
  }
  if (&kernels == &avx2::kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return &kernels == &baseline::kernels;
}

const AqKernels* const kBuilds[] = {
#ifdef AQ_X86
    &avx512::kernels, &avx2::kernels,
#endif
    &baseline::kernels};

const AqKernels* best() {
  for (const AqKernels* build : kBuilds) {
    if (runs(*build)) return build;
  }
  return &baseline::kernels;
}

const AqKernels* chosen = best();

}  // namespace

#define AQ_EXPORT extern "C" __attribute__((visibility("default")))

AQ_EXPORT int32_t aq_abi_version(void) { return AQ_ABI_VERSION; }

AQ_EXPORT const char* aq_instruction_sets(void) {
  static char names[64];
  names[0] = 0;
  for (const AqKernels* build : kBuilds) {
    if (!runs(*build)) continue;
    if (names[0] != 0) strcat(names, ",");
    strcat(names, build->name);
  }
  return names;
}

AQ_EXPORT int32_t aq_select(const char* name) {
  for (const AqKernels* build : kBuilds) {
    if (strcmp(build->name, name) != 0 || !runs(*build)) continue;
    chosen = build;
    return 0;
  }
  return 1;
}

AQ_EXPORT int64_t aq_linear_workspace(const AqLinear* layer, int64_t rows, int32_t num_threads) {
  return chosen->linear_workspace(layer, rows, num_threads);
}

AQ_EXPORT void aq_linear(const AqLinear* layer, const float* x, int64_t rows, float* y, void* workspace,
                         int32_t num_threads) {
  chosen->linear(layer, x, rows, y, workspace, num_threads);
}

AQ_EXPORT int64_t aq_decoder_workspace(const AqDecoder* decoder, const AqBatch* batch, int32_t num_threads) {
  return chosen->decoder_workspace(decoder, batch, num_threads);
}

AQ_EXPORT void aq_decoder_forward(const AqDecoder* decoder, const AqBatch* batch, float* logits, void* workspace,
                                  int32_t num_threads) {
  chosen->decoder_forward(decoder, batch, logits, workspace, num_threads);
}

AQ_EXPORT void aq_attention(const AqDecoder* decoder, const AqBatch* batch, const float* q, float* out, void* workspace,
                            int32_t num_threads) {
  chosen->attention(decoder, batch, q, out, workspace, num_threads);
}

AQ_EXPORT void aq_store(const AqDecoder* decoder, const AqBatch* batch, const float* k, const float* v) {
  chosen->store(decoder, batch, k, v);
}
