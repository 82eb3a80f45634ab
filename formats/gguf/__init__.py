"""GGUF tensor types: rows of blocks of bytes <-> canonical weights, bit for bit, and encoders for dense weights.

A row of K elements is a row of blocks of `block_size` elements and `block_bytes` bytes, each with its own scale (and
minimum). Byte i of a 32-element block of nibbles holds element i in the low half and element i + 16 in the high one.

    Q4_0   18 B   d, 16 B                   x = d (q - 8)
    Q4_1   20 B   d, m, 16 B                x = d q + m
    Q5_0   22 B   d, 32 fifth bits, 16 B    x = d (q - 16)
    Q5_1   24 B   d, m, 32 fifth bits, 16 B x = d q + m
    Q8_0   34 B   d, 32 int8                x = d q             canonical code: q + 128
    Q2_K   84 B, Q4_K 144 B, Q5_K 176 B     x = d sc q - dmin m     super-blocks of 256
    Q3_K  110 B, Q6_K 210 B                 x = d sc (q - 4), x = d sc (q - 32)
    MXFP4  17 B   exponent e, 16 B          x = 2**(e - 127) E2M1[q]
    NVFP4  36 B   four E4M3 scales, 32 B    x = scale E2M1[q], 64 elements in blocks of 16
    IQ4_NL 18 B   d, 16 B                   x = d table[q]

d, m and dmin are float16, sc and m of the super-blocks integers of 4, 6 or 8 bits.
"""

from aphroquant.formats.gguf.block_types import BLOCK_TYPES, UNREADABLE_TYPES, BlockType, block_type, type_for_rows
from aphroquant.formats.gguf.codec import decode, encode
from aphroquant.formats.gguf.holding import exact_type, in_type
from aphroquant.formats.gguf.quantize import ENCODABLE, quantize

__all__ = [
    "BLOCK_TYPES",
    "ENCODABLE",
    "UNREADABLE_TYPES",
    "BlockType",
    "block_type",
    "decode",
    "encode",
    "exact_type",
    "in_type",
    "quantize",
    "type_for_rows",
]
