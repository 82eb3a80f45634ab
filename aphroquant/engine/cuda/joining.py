"""Layers with the same input as one: their weights one below the other, where their scheme allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aphroquant.schemes import (
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)

_SHARED = ("group_index", "input_scale", "global_scale")  # of the columns or of all, not of the rows


def join_weights(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight with the rows of all in order, or None if their numbers cannot be described by one scheme."""
    if len(weights) == 1:
        return weights[0]
    parts = [_per_row(weight) for weight in weights]
    first = parts[0]
    if any(part.scheme != first.scheme or part.shape[1] != first.shape[1] for part in parts):
        return None
    if not _has_rows(first.scheme) or _has_cut_block(parts):
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
            tensors[name] = _cat(own)
    return QuantizedWeight(first.scheme, tensors, (sum(part.shape[0] for part in parts), first.shape[1]))


def join_biases(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """The biases one behind the other, zeros for layers without; None if there is none."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat([torch.zeros(n) if bias is None else bias.float() for bias, n in zip(biases, sizes, strict=True)])


def _has_rows(scheme: Scheme) -> bool:
    """Whether the tensors of the scheme have rows for those of the weight."""
    if isinstance(scheme, LookupScheme):
        return not scheme.flattened
    return isinstance(scheme, IntegerScheme | FloatScheme | KQuantScheme | DenseScheme)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """Also of FP8, which torch joins as bytes only."""
    if parts[0].dtype.itemsize > 1:
        return torch.cat(list(parts))
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


def _per_row(weight: QuantizedWeight) -> QuantizedWeight:
    """Scales of the whole tensor, or of blocks of all its numbers in a line, become scales of rows, where they can.

    Then layers with different ones can be joined.
    """
    scheme = weight.scheme
    if isinstance(scheme, LookupScheme) and scheme.flattened and weight.shape[1] % scheme.block_size == 0:
        scales = scheme.block_scales(weight.tensors) if scheme.scales == "nested" else weight["scales"]
        tensors = {"codes": weight["codes"], "scales": scales.view(weight.shape[0], -1)}
        kept = {name: weight[name] for name in _SHARED if name in weight.tensors}
        by_row = replace(scheme, flattened=False, scales="float" if scheme.scales == "nested" else scheme.scales)
        return QuantizedWeight(by_row, tensors | kept, weight.shape)
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
