// The C ABI: plain structs shared with kernels/cpu/abi.py (same fields, same order) and the exported functions.
//
// Nothing here allocates or checks: Python validates shapes and owns every buffer. All pointers are 64-byte aligned
// unless they point into a row.
#pragma once

#include <stdint.h>

#define AQ_ABI_VERSION 2

#ifdef __cplusplus
extern "C" {
#endif

enum AqKind { AQ_DENSE_F32 = 0, AQ_DENSE_F16 = 1, AQ_DENSE_BF16 = 2, AQ_CODES = 3, AQ_FP8 = 4 };

// How a row is quantized before it meets the weight. CHUNK: one int8 scale for each chunk of columns (the fast mode of
// weight-only layers). The others are part of the layer's scheme.
enum AqInput {
  AQ_INPUT_NONE = 0,
  AQ_INPUT_INT_CHUNK = 1,
  AQ_INPUT_INT_ROW = 2,
  AQ_INPUT_INT_STATIC = 3,
  AQ_INPUT_INT_GROUP = 4,
  AQ_INPUT_FP8_ROW = 5,
  AQ_INPUT_FP8_STATIC = 6,
  AQ_INPUT_FP8_GROUP = 7
};

enum AqFloat { AQ_F32 = 0, AQ_F16 = 1, AQ_BF16 = 2 };
enum AqOffsets { AQ_ZEROS_U8 = 0, AQ_OFFSETS = 1 };
enum AqCache { AQ_CACHE_F32 = 0, AQ_CACHE_F16 = 1, AQ_CACHE_BF16 = 2, AQ_CACHE_FP8 = 3, AQ_CACHE_INT8 = 4 };

// One linear layer, y = x W^T + bias. Outputs come in blocks of 16, columns in chunks that never cross a weight group.
// AQ_CODES: codes are lines of 64 bytes, [N/16][padded_in * bits / 32][16][4]: byte (i, j) of a line holds output i of
//   the block and columns 4 s + j for the 8 / bits successive steps s of the line, the first in the lowest bits.
// AQ_FP8: codes are [N/16][in_features][16]. Scales and offsets are [N/16][num_groups][16].
// Dense: the weight itself, row-major.
typedef struct {
  int32_t kind;
  int32_t bits;
  int64_t out_features, in_features;
  int64_t padded_in, chunk_len, num_chunks, num_groups;
  const void* codes;
  const void* scales;
  const void* offsets;
  const int32_t* chunk_groups;  // [num_chunks]
  const int32_t* columns;       // [padded_in], the source column or -1; null: identity
  const float* bias;            // [N padded to 16] or null
  const float* table;           // [16] or null: what a 4-bit code stands for; float32 throughout
  int32_t scale_type;           // AqFloat, of scales and of AQ_OFFSETS
  int32_t offset_kind;          // AqOffsets
  int32_t integer_dot;          // integer codes times int8 rows; otherwise float32 throughout
  int32_t input_kind;           // AqInput
  int32_t input_levels;         // largest integer code, 127 for 8 bits
  int32_t input_group;
  float input_scale;
  int32_t reserved;
} AqLinear;

typedef struct {
  const float* input_norm;
  const float* post_attention_norm;
  const float* q_norm;  // null without qk-norm
  const float* k_norm;
  AqLinear qkv[3];
  int32_t num_qkv;  // 1 when q, k and v are fused
  int32_t num_gate_up;
  AqLinear o;
  AqLinear gate_up[2];
  AqLinear down;
  void* keys;  // [num_blocks][kv_heads][block_size][head_dim]
  void* values;
  float* key_scales;  // int8: [num_blocks][kv_heads][block_size]; fp8: [kv_heads]
  float* value_scales;
  int64_t sliding_window;  // 0: none
} AqLayer;

typedef struct {
  int64_t num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size;
  int64_t block_size;
  float norm_eps, softmax_scale;
  int32_t key_type, value_type;  // AqCache
  const AqLayer* layers;
  const AqLinear* embedding;
  const AqLinear* head;
  const float* final_norm;
} AqDecoder;

typedef struct {
  int64_t num_tokens, num_sequences, max_blocks, num_logits, max_context;
  const int32_t* token_ids;
  const int32_t* positions;
  const int64_t* slot_mapping;
  const int32_t* query_start;
  const int32_t* context_lens;
  const int32_t* block_tables;  // [num_sequences][max_blocks]
  const int32_t* logits_rows;
  const float* cos;  // [max position + 1][head_dim / 2]
  const float* sin;
} AqBatch;

// Rounding to nearest without data (rounding.h). Matrices are row-major; `error` and `total` come out: the sums of the
// squares of errors and of weights.
typedef struct {
  const void* weight;  // [rows][columns]
  int64_t rows, columns, group_size;
  int32_t weight_type, scale_type;  // AqFloat
  int32_t bits, symmetric;
  uint8_t* codes;  // [rows][columns]
  void* scales;    // [rows][groups]
  uint8_t* zeros;  // [rows][groups], or null if symmetric
  double error, total;
} AqRounding;

// The same to e4m3, with one scale for `block_rows` x `block_columns` weights: given, or that of the largest of them.
typedef struct {
  const void* weight;
  int64_t rows, columns, block_rows, block_columns;
  int32_t weight_type, scales_given;
  uint8_t* codes;
  float* scales;  // [rows / block_rows][columns / block_columns], both rounded up
  double error, total;
} AqFloat8Rounding;

int32_t aq_abi_version(void);
// The names of the instruction sets that were built and that this processor runs, best first, separated by commas.
const char* aq_instruction_sets(void);
// Choose one of them by name for all later calls. 0 on success.
int32_t aq_select(const char* name);
// y [rows][N] = x [rows][K] W^T + bias; `workspace` has aq_linear_workspace bytes.
int64_t aq_linear_workspace(const AqLinear* layer, int64_t rows, int32_t num_threads);
void aq_linear(const AqLinear* layer, const float* x, int64_t rows, float* y, void* workspace, int32_t num_threads);
// The whole forward: logits [num_logits][vocab]. `workspace` has aq_decoder_workspace bytes.
int64_t aq_decoder_workspace(const AqDecoder* decoder, const AqBatch* batch, int32_t num_threads);
void aq_decoder_forward(const AqDecoder* decoder, const AqBatch* batch, float* logits, void* workspace,
                        int32_t num_threads);
// Attention alone: q [num_tokens][heads][head_dim] over layer 0's cache, whose keys and values are already stored.
// `workspace` as for the forward. A decoder without layers' linears and without a head will do.
void aq_attention(const AqDecoder* decoder, const AqBatch* batch, const float* q, float* out, void* workspace,
                  int32_t num_threads);
// Store k, v [num_tokens][kv_heads][head_dim] into layer 0's cache at batch->slot_mapping.
void aq_store(const AqDecoder* decoder, const AqBatch* batch, const float* k, const float* v);

// Codes [rows][count] of 1 to 8 bits in words (codes.h): the words of a row side by side, `stride` words from one row to
// the next, or of one place in all rows (across); AWQ's are across and of 4 bits. Packing returns the union of all codes.
void aq_unpack(const uint32_t* words, int64_t stride, int64_t rows, int64_t count, int32_t bits, uint8_t* codes);
void aq_unpack_across(const uint32_t* words, int64_t rows, int64_t count, int32_t bits, uint8_t* codes);
void aq_unpack_awq(const uint32_t* words, int64_t rows, int64_t count, uint8_t* codes);
int32_t aq_pack(const uint8_t* codes, int64_t rows, int64_t count, int32_t bits, uint32_t* words);
int32_t aq_pack_across(const uint8_t* codes, int64_t rows, int64_t count, int32_t bits, uint32_t* words);
int32_t aq_pack_awq(const uint8_t* codes, int64_t rows, int64_t count, uint32_t* words);
// The largest x & mask of unsigned numbers of 1, 2 or 4 bytes.
uint32_t aq_largest_masked(const void* numbers, int64_t count, int32_t width, uint32_t mask);
int32_t aq_round_integers(AqRounding* job);  // 1 if a scale does not fit its dtype, else 0
void aq_round_float8(AqFloat8Rounding* job);

#ifdef __cplusplus
}
#endif
