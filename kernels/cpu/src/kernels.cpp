// Compiled once per instruction set, with AQ_NAMESPACE naming it (kernels/CMakeLists.txt).
#include "codes.h"
#include "decoder.h"
#include "dispatch.h"
#include "rounding.h"

#define AQ_TEXT(name) #name
#define AQ_NAME(name) AQ_TEXT(name)

namespace AQ_NAMESPACE {

extern const AqKernels kernels;
const AqKernels kernels = {AQ_NAME(AQ_NAMESPACE), linear_workspace, linear,
                           decoder_workspace,     decoder_forward,  attention,
                           store_keys_and_values, unpack_codes, unpack_codes_across,
                           unpack_awq,            pack_codes,   pack_codes_across,
                           pack_awq,              largest_masked, round_integers,
                           round_float8};

}  // namespace AQ_NAMESPACE
