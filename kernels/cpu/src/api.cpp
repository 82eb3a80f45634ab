// The exported functions: each calls the build for the chosen instruction set.
#include <string.h>

#include "dispatch.h"

#define AQ_DECLARE(name)          \
  namespace name {                \
  extern const AqKernels kernels; \
  }
AQ_DECLARE(baseline)

namespace {

struct Build {
  const AqKernels* kernels;
  bool runs;  // on this processor
};

}  // namespace

#ifdef AQ_AVX2
AQ_DECLARE(avx2)
static bool runs_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#ifdef AQ_AVX2_VNNI
AQ_DECLARE(avx2_vnni)
static bool runs_avx2_vnni() { return runs_avx2() && __builtin_cpu_supports("avxvnni"); }
#endif
#ifdef AQ_AVX512
AQ_DECLARE(avx512)
static bool runs_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

namespace {

const Build kBuilds[] = {// best first
#ifdef AQ_AVX512
                         {&avx512::kernels, runs_avx512()},
#endif
#ifdef AQ_AVX2_VNNI
                         {&avx2_vnni::kernels, runs_avx2_vnni()},
#endif
#ifdef AQ_AVX2
                         {&avx2::kernels, runs_avx2()},
#endif
                         {&baseline::kernels, true}};

const AqKernels* best() {
  for (const Build& build : kBuilds) {
    if (build.runs) return build.kernels;
  }
  return nullptr;
}

const AqKernels* chosen = best();

}  // namespace

#define AQ_EXPORT extern "C" __attribute__((visibility("default")))

AQ_EXPORT int32_t aq_abi_version(void) {
  // A field more or less is another interface, whether or not somebody thought of the number.
  return AQ_ABI_VERSION * 65536 +
         static_cast<int32_t>(sizeof(AqLinear) + sizeof(AqLayer) + sizeof(AqDecoder) + sizeof(AqBatch) +
                              sizeof(AqRounding) + sizeof(AqFloat8Rounding));
}

AQ_EXPORT const char* aq_instruction_sets(void) {
  static char names[64];
  names[0] = 0;
  for (const Build& build : kBuilds) {
    if (!build.runs) continue;
    if (names[0] != 0) strcat(names, ",");
    strcat(names, build.kernels->name);
  }
  return names;
}

AQ_EXPORT int32_t aq_select(const char* name) {
  for (const Build& build : kBuilds) {
    if (!build.runs || strcmp(build.kernels->name, name) != 0) continue;
    chosen = build.kernels;
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

AQ_EXPORT void aq_unpack(const uint32_t* words, int64_t stride, int64_t rows, int64_t count, int32_t bits,
                         uint8_t* codes) {
  chosen->unpack(words, stride, rows, count, bits, codes);
}

AQ_EXPORT void aq_unpack_across(const uint32_t* words, int64_t rows, int64_t count, int32_t bits, uint8_t* codes) {
  chosen->unpack_across(words, rows, count, bits, codes);
}

AQ_EXPORT void aq_unpack_awq(const uint32_t* words, int64_t rows, int64_t count, uint8_t* codes) {
  chosen->unpack_awq(words, rows, count, codes);
}

AQ_EXPORT int32_t aq_pack(const uint8_t* codes, int64_t rows, int64_t count, int32_t bits, uint32_t* words) {
  return chosen->pack(codes, rows, count, bits, words);
}

AQ_EXPORT int32_t aq_pack_across(const uint8_t* codes, int64_t rows, int64_t count, int32_t bits, uint32_t* words) {
  return chosen->pack_across(codes, rows, count, bits, words);
}

AQ_EXPORT int32_t aq_pack_awq(const uint8_t* codes, int64_t rows, int64_t count, uint32_t* words) {
  return chosen->pack_awq(codes, rows, count, words);
}

AQ_EXPORT uint32_t aq_largest_masked(const void* numbers, int64_t count, int32_t width, uint32_t mask) {
  return chosen->largest_masked(numbers, count, width, mask);
}

AQ_EXPORT int32_t aq_round_integers(AqRounding* job) { return chosen->round_integers(job); }

AQ_EXPORT void aq_round_float8(AqFloat8Rounding* job) { chosen->round_float8(job); }
