"""Lookup weights in the layout of the integer kernels: 4-bit codes, with block scales as small as they are stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.integer.columns import ColumnOrder, arrange_columns
from aphroquant.kernels.cuda.integer.packing import COLUMNS, PackedInteger, group_lines, pack_codes
from aphroquant.schemes import LookupScheme, QuantizedWeight

_STEP = 16  # columns that share a scale at least
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The bytes that stored_scales.cuh knows, from .. to: not e8m0's smallest number and NaN, no NaN and negative e4m3.
_KNOWN = {torch.float8_e8m0fnu: (1, 254), torch.float8_e4m3fn: (0, 126)}


def group_columns(scheme: LookupScheme, in_features: int) -> int | None:
    """The columns of a row that share a scale, in pieces of one length; None if pieces would be too short."""
    if not scheme.flattened or in_features % scheme.block_size == 0:
        return scheme.block_size
    piece = math.gcd(scheme.block_size, in_features)
    return piece if piece % _STEP == 0 else None


def pack_lookup(weight: QuantizedWeight, device: torch.device | str | None = None) -> PackedInteger:
    """The weight of a lookup scheme without quantized inputs, on `device`."""
    scheme = weight.scheme
    size = group_columns(scheme, weight.shape[1]) if isinstance(scheme, LookupScheme) else None
    if not isinstance(scheme, LookupScheme) or size is None or scheme.activations is not None:
        raise UsageError(f"the lookup kernels cannot pack a weight {list(weight.shape)} of scheme {scheme}")
    weight = weight.to(torch.device(device)) if device is not None else weight
    factor = float(weight["global_scale"]) if scheme.scales == "e4m3" else 1.0
    scales = _row_scales(weight, scheme, size)
    order = arrange_columns(weight.shape[1], scales.shape[1], size, None, COLUMNS)
    columns = None if order.columns is None else order.columns.to(scales.device)
    return PackedInteger(
        bits=4,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        group_size=order.group_size,
        codes=_pair_codes(pack_codes(weight["codes"], 4, 0, columns, order.padded)),
        scales=_spread(order, scales),
        columns=columns,
        table=scheme.table,
        factor=factor,
    )


def unpack_lookup_codes(codes: Tensor) -> Tensor:
    """The inverse of what packing does to the layout of 4-bit integers."""
    first, second, third, fourth = codes.view(*codes.shape[:-1], -1, 4).unbind(-1)
    parts = (_low(first, second), _low(third, fourth), _high(first, second), _high(third, fourth))
    return torch.stack(parts, -1).flatten(-2)


def _pair_codes(codes: Tensor) -> Tensor:
    """Bytes of a word of 4-bit integers, code (r, e) at bit 4 r + 16 e -> at bit 8 r + 4 e: a byte a register."""
    first, second, third, fourth = codes.view(*codes.shape[:-1], -1, 4).unbind(-1)
    parts = (_low(first, third), _high(first, third), _low(second, fourth), _high(second, fourth))
    return torch.stack(parts, -1).flatten(-2)


def _low(first: Tensor, second: Tensor) -> Tensor:
    return first & 15 | second << 4


def _high(first: Tensor, second: Tensor) -> Tensor:
    return first >> 4 | second & 0xF0


def _row_scales(weight: QuantizedWeight, scheme: LookupScheme, size: int) -> Tensor:
    """[N, groups of `size` columns], without the global scale, in the smallest type that holds them."""
    if scheme.scales == "nested":
        scales = scheme.block_scales(weight.tensors)
    else:
        scales = weight["scales"]
        if scales.dtype in _KNOWN and not _known(scales):
            scales = scales.float().bfloat16()  # exact
        elif scales.dtype not in (*_KNOWN, *_SCALE_DTYPES):
            scales = scales.float()
    if not scheme.flattened:
        return scales
    rows, columns = weight.shape
    if size != scheme.block_size:
        scales = scales.repeat_interleave(scheme.block_size // size)
    return scales[: rows * columns // size].view(rows, columns // size)


def _known(scales: Tensor) -> bool:
    low, high = _KNOWN[scales.dtype]
    scale_bytes = scales.view(torch.uint8)
    return not bool(((scale_bytes < low) | (scale_bytes > high)).any())


def _spread(order: ColumnOrder, scales: Tensor) -> Tensor:
    """In the order of the kernels' lanes. Padding has bytes of 0: its products are not used."""
    if scales.dtype not in _KNOWN:
        return group_lines(order.spread(scales))
    lines = group_lines(order.spread(scales.view(torch.uint8)))
    return lines.view(scales.dtype)
