"""Encoders of four-bit codes into a table: MXFP4 and IQ4_NL. Each takes x and weights [B, 32]."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.schemes import TABLES

_E2M1_EXPONENT = 2  # of its largest value, 6
_BIAS, _MAX_EXPONENT = 127, 254
_IQ4_NL_STRETCHES = (0.85, 0.91, 0.97, 1.03, 1.09, 1.15)
_E2M1 = torch.tensor(TABLES["e2m1"][:8])
_IQ4_NL = torch.tensor(TABLES["iq4_nl"])


def mxfp4_block(x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The exponent that puts the largest element on the table's upper end, or the next one, whichever errs less."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1 - _E2M1_EXPONENT
    exponent = torch.where(largest == 0, -_BIAS, exponent).clamp(-_BIAS, _MAX_EXPONENT - 1 - _BIAS)
    candidates = [_e2m1_block(x, weights, exponent + above) for above in (0, 1)]
    better = candidates[1][0] < candidates[0][0]  # [B, 1]
    codes, chosen = (torch.where(better, candidates[1][part], candidates[0][part]) for part in (1, 2))
    return {"codes": codes, "scales": (chosen + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)}


def iq4_nl_block(x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The scale from a few that put the extreme on either end of the table, each refined once by least squares."""
    extreme = x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))
    boundaries = _midpoints(_IQ4_NL)
    best = x.new_zeros(x.shape[0], 1)
    scale = x.new_zeros(x.shape[0], 1)
    for end in (_IQ4_NL[0], _IQ4_NL[-1]):
        for stretch in _IQ4_NL_STRETCHES:
            step = torch.where(extreme == 0, 0.0, end * stretch / extreme)
            values = _IQ4_NL[torch.bucketize(x * step, boundaries)]
            product = (values * x).mul_(weights).sum(dim=-1, keepdim=True)
            square = values.square_().mul_(weights).sum(dim=-1, keepdim=True)
            gain = product * product / square
            better = (gain > best) & (extreme != 0)
            best = torch.where(better, gain, best)
            scale = torch.where(better, product / square, scale)
    scales = scale.half()
    codes = torch.bucketize(torch.where(scales == 0, 0.0, x / scales.float()), boundaries)
    return {"codes": codes.byte(), "scales": scales}


def _e2m1_block(x: Tensor, weights: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(error [B, 1], codes, exponent)."""
    scale = torch.ldexp(torch.ones_like(x[:, :1], dtype=torch.float64), exponent).float()
    magnitude = torch.bucketize(x.abs() / scale, _midpoints(_E2M1))
    error = (_E2M1[magnitude] * scale).sub_(x.abs()).square_().mul_(weights).sum(dim=-1, keepdim=True)
    negative = (x < 0) & (magnitude > 0)
    return error, magnitude.byte() | negative.byte() << 3, exponent


def _midpoints(values: Tensor) -> Tensor:
    """Between neighbours of an ascending table: where nearest rounding switches."""
    return (values[1:] + values[:-1]) / 2
