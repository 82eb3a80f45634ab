"""Encoders of the blocks of 32 integers: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. Each takes x and weights [B, 32]."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.formats.gguf.grids import affine_codes, fit_affine, fit_symmetric, symmetric_codes

_Q8_LEVELS = 127


def symmetric_block(x: Tensor, weights: Tensor, bits: int) -> dict[str, Tensor]:
    """Q4_0 and Q5_0."""
    zero = 2 ** (bits - 1)
    scales = fit_symmetric(x, weights, -zero, zero - 1).half()[:, None]
    codes = symmetric_codes(x, scales.float(), -zero, zero - 1) + zero
    return {"codes": codes.byte(), "scales": scales}


def affine_block(x: Tensor, weights: Tensor, bits: int) -> dict[str, Tensor]:
    """Q4_1 and Q5_1. Their minima may be positive, so x is fitted from its own minimum on."""
    levels = 2**bits - 1
    base = x.amin(dim=-1, keepdim=True).clamp_(min=0)  # of a block without negative numbers
    scale, minimum = fit_affine(x - base, weights, levels)
    scales, offsets = scale.half()[:, None], (minimum[:, None] + base).half()
    codes = affine_codes(x, scales.float(), offsets.float(), levels)
    return {"codes": codes.byte(), "scales": scales, "offsets": offsets}


def wide_block(x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Q8_0: 8 bits gain nothing from a search."""
    scales = (x.abs().amax(dim=-1, keepdim=True) / _Q8_LEVELS).half()
    codes = symmetric_codes(x, scales.float(), -_Q8_LEVELS, _Q8_LEVELS)
    return {"codes": (codes + 128).to(torch.uint8), "scales": scales}
