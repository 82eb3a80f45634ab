"""Headers before any work: a format writes an empty weight of each kind, and its tensors are looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.formats.base import Format, TensorHeader
from aphroquant.formats.reading import headers_of
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


def module_headers(
    target: Format,
    modules: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, IntegerScheme | FloatScheme | AdditiveScheme],
    scale_dtype: torch.dtype,
) -> dict[str, dict[str, TensorHeader]]:
    """What each module is stored as, by suffix. UsageError from the format if it cannot hold one of the shapes."""
    by_kind: dict[tuple[tuple[int, int], IntegerScheme | FloatScheme | AdditiveScheme], dict[str, TensorHeader]] = {}
    headers = {}
    for module, shape in modules.items():
        kind = shape, schemes[module]
        if kind not in by_kind:
            by_kind[kind] = headers_of(target.write(module, empty_weight(schemes[module], shape, scale_dtype)))
        headers[module] = by_kind[kind]
    return headers


def num_bytes(headers: Mapping[str, TensorHeader]) -> int:
    """Of all these tensors."""
    return sum(math.prod(header.shape) * header.dtype.itemsize for header in headers.values())
