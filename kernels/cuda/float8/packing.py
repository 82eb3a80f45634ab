"""FP8 weights for 16-bit activations: e4m3 codes in the layout of 8-bit integers, with scales of the same form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cuda.integer.columns import arrange_columns
from aphroquant.kernels.cuda.integer.packing import COLUMNS, PackedInteger, group_lines, pack_codes
from aphroquant.schemes import FloatScheme, QuantizedWeight

_NAN_CODE = 0x7F  # without its sign; e4m3 has no infinity


@dataclass(frozen=True)
class PackedFloat8(PackedInteger):
    """W = code * scale: `bits` is 8, `codes` are those of e4m3, `scales` float32."""


def pack_float8(weight: QuantizedWeight, device: torch.device | str | None = None) -> PackedFloat8:
    """The weight of an FP8 scheme, on `device`. Blocks become groups of each of their rows."""
    scheme = weight.scheme
    assert isinstance(scheme, FloatScheme)
    codes = weight["codes"].to(device).view(torch.uint8)
    rows, columns = codes.shape
    scales = weight["scales"].to(device, torch.float32)
    width = None
    if scheme.block_shape is not None:
        height, width = scheme.block_shape
        scales = scales.repeat_interleave(height, 0)[:rows]
    else:
        scales = scales.expand(rows, 1) if scales.dim() else scales.reshape(1, 1).expand(rows, 1)
    order = arrange_columns(columns, scales.shape[1], width, None, COLUMNS)
    return PackedFloat8(
        bits=8,
        out_features=rows,
        in_features=columns,
        group_size=order.group_size,
        codes=pack_codes(codes, 8, 0, order.columns, order.padded),
        scales=group_lines(order.spread(_with_nan(codes, scales))),
        columns=order.columns,
    )


def _with_nan(codes: Tensor, scales: Tensor) -> Tensor:
    """NaN for the rows that hold one: their outputs are NaN for any input, and the kernel knows no NaN among codes."""
    broken = ((codes & 0x7F) == _NAN_CODE).any(1, keepdim=True)
    return torch.where(broken, torch.nan, scales)
