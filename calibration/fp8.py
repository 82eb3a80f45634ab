"""FP8 (e4m3) weights: scales from the largest magnitude per tensor, channel or block; static input scales from maxima.

The format's relative precision does not depend on the scale, so that nothing is gained by searching one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.calibration.inputs import E4M3_MAX, with_input_scale
from aphroquant.calibration.solution import Solution, relative_error
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.errors import InputError
from aphroquant.kernels.cpu import rounding
from aphroquant.numbers import is_finite, largest_magnitude
from aphroquant.schemes import FloatScheme, QuantizedWeight, Scheme

_DETAILS = {"rounding": "nearest"}


def solve(
    weights: Sequence[Tensor], statistics: InputStatistics | None, scheme: Scheme, scale_dtype: torch.dtype
) -> list[Solution]:
    """Each weight [N, K] rounded to FP8; with static inputs all get one scale from the greatest |x|."""
    assert isinstance(scheme, FloatScheme)
    solutions = []
    for weight in weights:
        rounded = round_fp8(weight, scheme)
        quantized, error = rounded.weight, rounded.relative_error
        if statistics is not None:
            error = relative_error(weight.float(), quantized.dequantize(), statistics)
        solution = with_input_scale(quantized, statistics)
        static = {"input_scale": float(solution["input_scale"])} if "input_scale" in solution.tensors else {}
        solutions.append(Solution(solution, error, rounded.details | static))
    return solutions


def round_fp8(weight: Tensor, scheme: FloatScheme, magnitude: Tensor | None = None) -> Solution:
    """`quantize_fp8` and the squared error relative to the weight's."""
    if not rounding.usable(weight) or scheme.dtype != torch.float8_e4m3fn:
        quantized = quantize_fp8(weight, scheme, magnitude)
        return Solution(quantized, relative_error(weight.float(), quantized.dequantize(), None), _DETAILS)
    if not is_finite(weight):
        raise _not_finite()
    rows, columns = weight.shape
    scale = None
    if scheme.granularity == "tensor":
        scale = _scale_of(largest_magnitude(weight) if magnitude is None else magnitude)
    block = scheme.block_shape or (1, columns)
    found = rounding.round_float8(weight, block, scale)
    rounded = QuantizedWeight(
        scheme, {"codes": found.codes.view(scheme.dtype), "scales": found.scales}, (rows, columns)
    )
    error = found.error / found.total if found.total > 0 else 0.0
    return Solution(rounded, error, _DETAILS, square_sum=found.total)


def quantize_fp8(weight: Tensor, scheme: FloatScheme, magnitude: Tensor | None = None) -> QuantizedWeight:
    """Weight [N, K] with scale = greatest magnitude / 448 of its tensor, row or block, float32.

    `magnitude` [] is that of the tensor, if the weight is only a part of its rows.
    """
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise _not_finite()
    num_rows, width = weight.shape
    if scheme.block_shape is not None:
        rows, columns = scheme.block_shape
        padded = torch.nn.functional.pad(weight, (0, -width % columns, 0, -num_rows % rows))
        blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        scales = _scale_of(blocks.abs().amax((1, 3)))  # [N / rows, K / columns]
        per_weight = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:num_rows, :width]
    elif scheme.granularity == "channel":
        scales = per_weight = _scale_of(weight.abs().amax(1, keepdim=True))
    else:
        if magnitude is None:
            magnitude = weight.abs().amax() if weight.numel() else torch.zeros(())
        scales = per_weight = _scale_of(magnitude)
    codes = (weight / per_weight).clamp_(-E4M3_MAX, E4M3_MAX).to(scheme.dtype)
    return QuantizedWeight(scheme, {"codes": codes, "scales": scales}, (num_rows, width))


def _not_finite() -> InputError:
    return InputError("a weight is not finite and cannot be quantized")


def _scale_of(magnitude: Tensor) -> Tensor:
    """The scale under which `magnitude` is the largest code; 1 where it is zero."""
    scale = magnitude.float() / E4M3_MAX
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
