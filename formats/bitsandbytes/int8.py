"""LLM.int8: signed bytes and the largest magnitude of each row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import TensorHeader
from aphroquant.schemes import IntegerScheme, QuantizedWeight

INT8 = IntegerScheme(8, None, symmetric=True)


def scheme(module: str, headers: Mapping[str, TensorHeader]) -> IntegerScheme:
    out_features, _ = reading.require_matrix(module, headers, "weight", (torch.int8,))
    reading.require_shape(module, headers, "SCB", reading.SCALE_DTYPES, (out_features,))
    return INT8


def read(module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    if "weight_format" in tensors and tensors["weight_format"].any():
        raise InputError(f"{module}.weight_format is not 0: only weights in row order are readable")
    codes = tensors["weight"].to(torch.int16).add(128).to(torch.uint8)
    scales = row_scales(tensors["SCB"])[:, None]
    return QuantizedWeight(INT8, {"codes": codes, "scales": scales}, (codes.shape[0], codes.shape[1]))


def row_scales(maxima: Tensor) -> Tensor:
    """float32 [N]."""
    return maxima.float().div(127)


def write(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    return {
        "weight": weight["codes"].to(torch.int16).sub(128).to(torch.int8).contiguous(),
        "SCB": _row_maxima(module, weight["scales"]),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _row_maxima(module: str, scales: Tensor) -> Tensor:
    """SCB float32 [N] with SCB / 127 equal to the scales [N, 1] to the last bit.

    Up to two numbers are. The library takes maxima of float16 weights, so one that is a float16 is the stored one.
    """
    scale = writing.exact_cast("bitsandbytes", module, "scales", scales, torch.float32).flatten()
    nearest = scale.double().mul(127).float()
    maxima = nearest.half().float()
    for candidate in (nearest, nearest.nextafter(torch.zeros(())), nearest.nextafter(2 * nearest)):
        maxima = torch.where(maxima / 127 == scale, maxima, candidate)
    wrong = maxima / 127 != scale
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise UsageError(
            f"{module}: scales[{row}] = {float(scale[row])!r} is no float32 divided by 127, as bitsandbytes keeps it",
            hint=writing.REQUANTIZE,
        )
    return maxima
