"""Headers before any work: a format writes an empty weight of each kind, and its tensors are looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.formats.base import Format, TensorHeader
from aphroquant.formats.reading import headers_of
from aphroquant.schemes import FloatScheme, IntegerScheme, QuantizedWeight, Scheme


def empty_weight(scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype) -> QuantizedWeight:
    """A weight of zeros; global scales and those of inputs are ones."""
    dtypes = {"codes": torch.uint8} | scheme.dtypes()
    if isinstance(scheme, IntegerScheme):
        dtypes["zeros"] = torch.uint8
    if isinstance(scheme, FloatScheme):
        dtypes = {"codes": scheme.dtype, "scales": torch.float32}
    tensors: dict[str, Tensor] = {
        name: torch.zeros(size, dtype=dtypes.get(name, scale_dtype)) for name, size in scheme.shapes(*shape).items()
    }
    inputs = getattr(scheme, "activations", None)
    if inputs is not None and not inputs.dynamic:
        tensors["input_scale"] = torch.ones(())
    for name in ("global_scale", "input_scale", "nested_table", "nested_scales", "nested_offset"):
        if name in tensors:
            tensors[name] = torch.ones(tensors[name].shape)
    return QuantizedWeight(scheme, tensors, shape)


def module_headers(
    target: Format,
    modules: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, Scheme],
    scale_dtype: torch.dtype,
) -> dict[str, dict[str, TensorHeader]]:
    """What each module is stored as, by suffix. UsageError from the format if it cannot hold one of the shapes."""
    by_kind: dict[tuple[tuple[int, int], Scheme], dict[str, TensorHeader]] = {}
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
