"""Layers with the same input as one: their weights one below the other, where their scheme allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, QuantizedWeight

_SHARED = ("group_index", "input_scale")  # of the columns, not of the rows


def join_weights(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight with the rows of all in order, or None if their numbers cannot be described by one scheme."""
    if len(weights) == 1:
        return weights[0]
    parts = [_per_channel(weight) for weight in weights]
    first = parts[0]
    if any(part.scheme != first.scheme or part.shape[1] != first.shape[1] for part in parts):
        return None
    if not isinstance(first.scheme, IntegerScheme | FloatScheme | DenseScheme) or _has_cut_block(parts):
        return None
    tensors: dict[str, Tensor] = {}
    for name in first.tensors:
        own = [part[name] for part in parts]
        if name in _SHARED:
            if not all(torch.equal(own[0], other) for other in own[1:]):
                return None
            tensors[name] = own[0]
        else:
            if len({tensor.dtype for tensor in own}) > 1:
                return None
            tensors[name] = torch.cat(own)
    return QuantizedWeight(first.scheme, tensors, (sum(part.shape[0] for part in parts), first.shape[1]))


def join_biases(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """The biases one behind the other, zeros for layers without; None if there is none."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat([torch.zeros(n) if bias is None else bias.float() for bias, n in zip(biases, sizes, strict=True)])


def _per_channel(weight: QuantizedWeight) -> QuantizedWeight:
    """A scale for the whole tensor becomes one for each row: then layers with different scales can be joined."""
    scheme = weight.scheme
    if not isinstance(scheme, FloatScheme) or scheme.granularity != "tensor":
        return weight
    scales = weight["scales"].reshape(1, 1).expand(weight.shape[0], 1).contiguous()
    return QuantizedWeight(replace(scheme, granularity="channel"), {**weight.tensors, "scales": scales}, weight.shape)


def _has_cut_block(parts: Sequence[QuantizedWeight]) -> bool:
    """Whether a block of rows that share a scale would be cut short in the middle of the joined weight."""
    scheme = parts[0].scheme
    if not isinstance(scheme, FloatScheme) or scheme.block_shape is None:
        return False
    return any(part.shape[0] % scheme.block_shape[0] for part in parts[:-1])
