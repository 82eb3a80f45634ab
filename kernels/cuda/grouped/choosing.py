"""Which experts a token goes to, by the logits of its router."""

from __future__ import annotations

from ctypes import c_int32
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.kernels.cuda.launcher import cuda_kernel

_WARPS = 4  # of a block, each with one token


class Choice(NamedTuple):
    """The experts of each token, int32 [T, k], and their weights, float32 [T, k]."""

    ids: Tensor
    weights: Tensor


def choose_experts(logits: Tensor, top_k: int, normalizes: bool) -> Choice:
    """float32 [T, E], contiguous -> the `top_k` largest, with shares of the softmax over all or over the chosen."""
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        macros = {"EXPERTS": experts, "TOP_K": top_k, "NORMALIZES": int(normalizes), "WARPS": _WARPS}
        cuda_kernel("grouped_choose.cu", "grouped_choose", macros).launch(
            grid=(-(-tokens // _WARPS), 1, 1),
            block=(_WARPS * 32, 1, 1),
            args=[logits, ids, weights, c_int32(tokens)],
            programmatic=True,
        )
    return Choice(ids, weights)
