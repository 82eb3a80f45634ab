"""The decode kernel for layers of common models, for checking its machine code and for compiling ahead."""

from __future__ import annotations

from dataclasses import replace

import torch

from aphroquant.kernels.cuda.integer.decode_plan import (
    TOKENS_OF_TILE,
    DecodeShape,
    ceil_div,
    choose_plan,
    decode_macros,
)
from aphroquant.kernels.cuda.variants import KernelVariant

SOURCE, ENTRY = "integer_decode.cu", "integer_decode"
_SMALL_SPILL = 96  # bytes, where x is loaded: outside of the loop over the weight
_GPUS = {"sm_80": (108, (8, 0)), "sm_89": (128, (8, 9)), "sm_90a": (132, (9, 0))}  # multiprocessors, capability
_LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # of Llama-3-8B


def _variant(
    bits: int,
    layer: tuple[int, int],
    tokens: int,
    architecture: str,
    tested: bool,
    zero_kind: int = 0,
    bulk_input: bool = False,
) -> KernelVariant:
    n, k = layer
    dtype = torch.bfloat16
    shape = DecodeShape(bits, 128, zero_kind, dtype, n, k, k, False, False, dtype)
    plan = replace(choose_plan(shape, tokens, *_GPUS[architecture]), bulk_input=bulk_input)
    macros = decode_macros(shape, plan, ceil_div(tokens, TOKENS_OF_TILE))
    sass = ("HMMA", "LDSM", "UBLKCP", "ACQBULK") if architecture == "sm_90a" else ("HMMA", "LDSM", "LDGSTS.128")
    return KernelVariant(SOURCE, ENTRY, macros, (architecture,), _SMALL_SPILL, sass, tested=tested)


DECODE_VARIANTS = (
    *(_variant(4, layer, tokens, "sm_90a", tested=True) for layer in _LAYERS for tokens in (1, 16)),
    *(_variant(bits, _LAYERS[1], 1, "sm_90a", tested=True) for bits in (2, 3, 8)),
    *(_variant(4, _LAYERS[1], 16, "sm_90a", tested=True, zero_kind=kind) for kind in (1, 2)),
    *(_variant(4, layer, 1, "sm_90a", layer == _LAYERS[1], bulk_input=True) for layer in _LAYERS),
    *(_variant(4, _LAYERS[1], tokens, gpu, tested=tokens == 1) for gpu in ("sm_80", "sm_89") for tokens in (1, 16)),
    *(_variant(bits, layer, tokens, "sm_90a", False) for bits in (2, 3, 8) for layer in _LAYERS for tokens in (1, 16)),
)
