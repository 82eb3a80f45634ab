"""Layers of several experts: tokens sorted by expert, the product, and the weighted sums back, wherever they run.

layer = backend.prepare_grouped(weights, biases)
groups = group_tokens(expert_ids, num_experts)
out = combine(layer(x, groups), groups, weights)
"""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.kernels.reference import grouped as reference
from aphroquant.kernels.reference.grouped import TokenGroups

__all__ = ["TokenGroups", "combine", "group_tokens"]


def group_tokens(expert_ids: Tensor, num_experts: int) -> TokenGroups:
    """Pairs of a token and an expert, sorted by expert. expert_ids: int32 or int64 [T, k].

    On a GPU one kernel does it, and nothing is read on the host.
    """
    if _has_kernels(expert_ids):
        from aphroquant.kernels.cuda.grouped import routing

        if num_experts <= routing.MAX_EXPERTS:
            return routing.group_tokens(expert_ids, num_experts)
    return reference.group_tokens(expert_ids, num_experts)


def combine(y: Tensor, groups: TokenGroups, weights: Tensor) -> Tensor:
    """y [T * k, N] in the order of places, weights [T, k] -> [T, N] in y's dtype; added up in float32, in k's order."""
    if _has_kernels(y) and y.dtype in (torch.bfloat16, torch.float16):
        from aphroquant.kernels.cuda.grouped import routing

        return routing.combine(y, groups, weights)
    return reference.combine(y, groups.places, weights)


def _has_kernels(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    from aphroquant.kernels.cuda.device import obstacle

    return obstacle() is None
