"""GGUF's super-blocks in the layout of the integer kernels: codes and sub-block scales as wide as they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.integer.packing import COLUMNS, PackedInteger, group_lines, pack_codes
from aphroquant.schemes import KQuantScheme, QuantizedWeight


def pack_super_blocks(weight: QuantizedWeight, device: torch.device | str | None = None) -> PackedInteger:
    """The weight of a K-quant, on `device`: W = d * scale * (code - middle), or d * scale * code - dmin * minimum."""
    scheme = weight.scheme
    if not isinstance(scheme, KQuantScheme):
        raise UsageError(f"the kernels of super-blocks cannot pack a weight of scheme {scheme}")
    weight = weight.to(torch.device(device)) if device is not None else weight
    assert weight.shape[1] % COLUMNS == 0 and scheme.zero in (None, 2 ** (scheme.bits - 1))
    names = ("d",) if scheme.zero is not None else ("d", "dmin")
    return PackedInteger(
        bits=scheme.bits,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        group_size=scheme.sub_block,
        codes=pack_codes(weight["codes"], scheme.bits, 0, None, weight.shape[1]),
        scales=_small_lines(weight["sub_scales"]),
        offsets=None if scheme.zero is not None else _small_lines(weight["sub_mins"]),
        supers=torch.stack([group_lines(weight[name].half()) for name in names], 2),
    )


def _small_lines(values: Tensor) -> Tensor:
    """Six bits, or eight with a sign."""
    return group_lines(values.to(torch.int8))
