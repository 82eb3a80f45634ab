"""The tensor types by the id that a file gives them."""

from __future__ import annotations

import difflib
from typing import NamedTuple

import torch

from aphroquant.errors import UsageError
from aphroquant.schemes import DenseScheme, IntegerScheme, KQuantScheme, LookupScheme, Scheme

BLOCK = 32
SUPER_BLOCK = 256


class BlockType(NamedTuple):
    """One ggml tensor type: its name, and `block_bytes` for every `block_size` elements of a row."""

    name: str
    block_size: int
    block_bytes: int
    scheme: Scheme

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of that many elements, a multiple of the block size."""
        return columns // self.block_size * self.block_bytes


BLOCK_TYPES = {  # by the type id in the file
    0: BlockType("F32", 1, 4, DenseScheme(torch.float32)),
    1: BlockType("F16", 1, 2, DenseScheme(torch.float16)),
    2: BlockType("Q4_0", BLOCK, 18, IntegerScheme(4, BLOCK, symmetric=True)),
    3: BlockType("Q4_1", BLOCK, 20, IntegerScheme(4, BLOCK, symmetric=False, has_offsets=True)),
    6: BlockType("Q5_0", BLOCK, 22, IntegerScheme(5, BLOCK, symmetric=True)),
    7: BlockType("Q5_1", BLOCK, 24, IntegerScheme(5, BLOCK, symmetric=False, has_offsets=True)),
    8: BlockType("Q8_0", BLOCK, 34, IntegerScheme(8, BLOCK, symmetric=True)),
    10: BlockType("Q2_K", SUPER_BLOCK, 84, KQuantScheme("q2_k")),
    11: BlockType("Q3_K", SUPER_BLOCK, 110, KQuantScheme("q3_k")),
    12: BlockType("Q4_K", SUPER_BLOCK, 144, KQuantScheme("q4_k")),
    13: BlockType("Q5_K", SUPER_BLOCK, 176, KQuantScheme("q5_k")),
    14: BlockType("Q6_K", SUPER_BLOCK, 210, KQuantScheme("q6_k")),
    20: BlockType("IQ4_NL", BLOCK, 18, LookupScheme("iq4_nl", BLOCK, "float")),
    30: BlockType("BF16", 1, 2, DenseScheme(torch.bfloat16)),
    39: BlockType("MXFP4", BLOCK, 17, LookupScheme("e2m1", BLOCK, "e8m0")),
    40: BlockType("NVFP4", 64, 36, LookupScheme("e2m1", 16, "e4m3")),
}
TYPE_IDS = {kind.name: type_id for type_id, kind in BLOCK_TYPES.items()}
# What llama.cpp takes where rows are no whole super-blocks.
_STAND_INS = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Named in messages about files that hold them.
UNREADABLE_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    41: "Q1_0", 42: "Q2_0",
}  # fmt: skip


def block_type(name: str) -> BlockType:
    """The type of that name, in upper or lower case."""
    if name.upper() not in TYPE_IDS:
        near = difflib.get_close_matches(name.upper(), TYPE_IDS, n=1)
        known = f"the types are {', '.join(TYPE_IDS)}"
        raise UsageError(f"unknown GGUF type {name!r}", hint=f"Did you mean {near[0]!r}? {known}" if near else known)
    return BLOCK_TYPES[TYPE_IDS[name.upper()]]


def type_for_rows(kind: BlockType, columns: int) -> BlockType:
    """`kind` if rows of that length are whole blocks of it, else the nearest type of which they are: F16 at last."""
    if columns % kind.block_size == 0:
        return kind
    return block_type("F16") if columns % BLOCK else block_type(_STAND_INS.get(kind.name, "Q8_0"))
