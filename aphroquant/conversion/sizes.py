"""Sizes before any work: a format writes an empty weight of each shape, and its tensors are measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.formats.base import Format
from aphroquant.schemes import AdditiveScheme, FloatScheme, IntegerScheme, QuantizedWeight


def empty_weight(
    scheme: IntegerScheme | FloatScheme | AdditiveScheme, shape: tuple[int, int], scale_dtype: torch.dtype
) -> QuantizedWeight:
    """A weight of zeros."""
    if isinstance(scheme, AdditiveScheme):
        dtypes = {"codebooks": scale_dtype, "scales": scale_dtype, **scheme.dtypes()}
    else:
        code_dtype = torch.uint8 if isinstance(scheme, IntegerScheme) else scheme.dtype
        dtypes = {"codes": code_dtype, "zeros": torch.uint8, "scales": scale_dtype}
    tensors: dict[str, Tensor] = {
        name: torch.zeros(size, dtype=dtypes[name]) for name, size in scheme.shapes(*shape).items()
    }
    if isinstance(scheme, FloatScheme):
        tensors["scales"] = tensors["scales"].float()
    if not isinstance(scheme, AdditiveScheme) and scheme.activations is not None and not scheme.activations.dynamic:
        tensors["input_scale"] = torch.ones(())
    return QuantizedWeight(scheme, tensors, shape)


def module_bytes(
    target: Format,
    modules: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, IntegerScheme | FloatScheme | AdditiveScheme],
    scale_dtype: torch.dtype,
) -> dict[str, int]:
    """Stored bytes of each module. UsageError from the format if it cannot hold one of the shapes."""
    by_kind: dict[tuple[tuple[int, int], IntegerScheme | FloatScheme | AdditiveScheme], int] = {}
    sizes = {}
    for module, shape in modules.items():
        kind = shape, schemes[module]
        if kind not in by_kind:
            tensors = target.write(module, empty_weight(schemes[module], shape, scale_dtype))
            by_kind[kind] = sum(tensor.nbytes for tensor in tensors.values())
        sizes[module] = by_kind[kind]
    return sizes
