"""Scales of blocks as formats store them: floats, floats quantized once more, e4m3 under a global scale, exponents."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from aphroquant.calibration.inputs import E4M3_MAX
from aphroquant.kernels.reference.linear import E2M1_MAX
from aphroquant.schemes import LookupScheme, QuantizedWeight
from aphroquant.schemes.lookup import NESTED_BLOCK_SIZE
from aphroquant.schemes.tables import E8M0_BIAS, e8m0_exponents

E4M3_BYTES = (1, 126)  # of the smallest and the largest positive number
E8M0_BYTES = (0, 254)
_TINY = 1e-38  # what bitsandbytes divides by at least
_MAP_EXPONENTS = 7


def plain_global(magnitude: Tensor) -> Tensor:
    """The global scale, float64 [], that puts the largest weight on the largest code under the largest block scale.

    It is the reciprocal of the float32 that compressed-tensors stores.
    """
    divisor = E4M3_MAX * E2M1_MAX / magnitude.float().clamp(min=torch.finfo(torch.float32).tiny)
    return 1 / torch.nan_to_num(divisor, posinf=1.0).double()


def roomy_global(magnitude: Tensor) -> Tensor:
    """The smallest power of two, float64 [], under which the largest weight may also become the code 4 instead of 6.

    A power of two is exact as a factor and as a divisor, so that both layouts of NVFP4 hold the same numbers. Its size
    matters little: block scales keep their precision over fifteen octaves.
    """
    ratio = float(magnitude) / (E4M3_MAX * 4)
    exponent = math.ceil(math.log2(ratio)) if ratio > 0 else 0
    return torch.tensor(2.0 ** min(max(-126, exponent), 126), dtype=torch.float64, device=magnitude.device)


def e4m3_codes(scales: Tensor, global_scale: Tensor) -> Tensor:
    """The bytes of the nearest e4m3 numbers to scales / global_scale, none of them zero; 1 for a scale of zero."""
    relative = torch.where(scales == 0, 1.0, scales * (1 / global_scale).to(scales.dtype))
    codes = relative.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.clamp(*E4M3_BYTES)


def decoded_bytes(codes: Tensor, scheme: LookupScheme, global_scale: Tensor) -> Tensor:
    """What scales of one byte each are to a reader, float32."""
    if scheme.scales == "e4m3":
        return scheme.block_scales({"scales": codes.view(torch.float8_e4m3fn), "global_scale": global_scale})
    return scheme.block_scales({"scales": codes.view(torch.float8_e8m0fnu)})


def plain_exponents(largest: Tensor) -> Tensor:
    """The biased exponents, uint8 [B], of blocks with these largest magnitudes."""
    return (e8m0_exponents(largest) + E8M0_BIAS).to(torch.uint8)


def nest(scales: Tensor) -> dict[str, Tensor]:
    """float32 scales [B] quantized to 8 bits as bitsandbytes does: less their mean, in blocks of 256, by its table."""
    table, offset = dynamic_map(), scales.mean()
    groups = torch.nn.functional.pad(scales - offset, (0, -scales.shape[0] % NESTED_BLOCK_SIZE))
    groups = groups.view(-1, NESTED_BLOCK_SIZE)
    largest = groups.abs().amax(1)
    relative = groups * (1 / largest.clamp(min=_TINY))[:, None]
    table = table.to(scales.device)
    codes = torch.bucketize(relative, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return {
        "scales": codes.flatten()[: scales.shape[0]],
        "nested_table": table,
        "nested_scales": largest,
        "nested_offset": offset,
    }


def nested(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight with float scales, its scales quantized once more; the codes stay."""
    assert isinstance(weight.scheme, LookupScheme)
    return QuantizedWeight(
        replace(weight.scheme, scales="nested"), {"codes": weight["codes"], **nest(weight["scales"])}, weight.shape
    )


@cache
def dynamic_map() -> Tensor:
    """bitsandbytes' table of 256 signed numbers, float32: for each power of ten twice as many steps as for the last."""
    values = [0.0, 1.0]
    for power in range(_MAP_EXPONENTS):
        borders = torch.linspace(0.1, 1, 2**power + 1)
        middles = (10 ** (power + 1 - _MAP_EXPONENTS) * ((borders[1:] + borders[:-1]) / 2)).tolist()
        values += [*middles, *(-value for value in middles)]
    return torch.tensor(sorted(values), dtype=torch.float32)
