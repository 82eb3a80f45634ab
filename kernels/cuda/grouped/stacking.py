"""The weights of several experts in one layout: those of the dense kernels, one expert after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.integer.packing import PackedInteger, pack, pack_groups
from aphroquant.schemes import IntegerScheme, QuantizedWeight


def stack_biases(biases: Sequence[Tensor] | None, device: torch.device | str) -> Tensor | None:
    """float32 [E, N]."""
    return None if biases is None else torch.stack([bias.detach().to(device, torch.float32) for bias in biases])


def stack_integers(weights: Sequence[QuantizedWeight], device: torch.device | str) -> PackedInteger:
    """The experts' weights with super rows, scales and zeros of one after those of another; columns are [E, padded].

    `out_features` is that of one expert.
    """
    far = any(_has_far_zeros(weight) for weight in weights)
    dtypes = {weight["scales"].dtype for weight in weights}
    parts = [pack(weight, device) if not far else _pack_with_offsets(weight, device) for weight in weights]
    if len(dtypes) > 1:
        parts = [_with_float_scales(part) for part in parts]
    sizes = {part.group_size for part in parts}
    if len(sizes) > 1 or len({part.codes.shape for part in parts}) > 1:
        raise UsageError("the experts' columns are in groups of different sizes")
    return stack_packed(parts)


def stack_packed(parts: Sequence[PackedInteger]) -> PackedInteger:
    """Packed weights that are alike, as one."""

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    columns = None if parts[0].columns is None else torch.stack([_columns(part) for part in parts])
    codes, scales = joined("codes"), joined("scales")
    assert codes is not None and scales is not None
    zeros, offsets = joined("zeros"), joined("offsets")
    return replace(parts[0], codes=codes, scales=scales, zeros=zeros, offsets=offsets, columns=columns)


def _columns(part: PackedInteger) -> Tensor:
    assert part.columns is not None
    return part.columns


def _has_far_zeros(weight: QuantizedWeight) -> bool:
    """Whether packing turns zero points into offsets: then it must for all experts."""
    scheme = weight.scheme
    assert isinstance(scheme, IntegerScheme)
    return scheme.bits < 8 and "zeros" in weight.tensors and bool((weight["zeros"] > 2**scheme.bits).any())


def _pack_with_offsets(weight: QuantizedWeight, device: torch.device | str) -> PackedInteger:
    scheme = weight.scheme
    assert isinstance(scheme, IntegerScheme)
    tensors = {name: tensor.to(device) for name, tensor in weight.tensors.items()}
    scales = tensors["scales"].float()
    group_index = tensors.get("group_index")
    return pack_groups(
        scheme.bits,
        tensors["codes"],
        scales,
        scheme.group_size,
        offsets=-tensors["zeros"].float() * scales,  # exact
        group_index=None if group_index is None else group_index.long(),
    )


def _with_float_scales(part: PackedInteger) -> PackedInteger:
    offsets = None if part.offsets is None else part.offsets.float()
    return replace(part, scales=part.scales.float(), offsets=offsets)
