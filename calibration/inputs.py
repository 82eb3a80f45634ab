"""Scales of inputs that a checkpoint stores, from the greatest magnitude that calibration has seen."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from aphroquant.calibration.statistics import InputStatistics
from aphroquant.errors import InputError
from aphroquant.kernels.reference.linear import E2M1_MAX, input_scheme, quantize_dequantize
from aphroquant.schemes import ActivationScheme, LookupScheme, QuantizedWeight, Scheme

E4M3_MAX = 448.0
_LOWEST_EXPONENT = -126


def needs_input_scale(scheme: Scheme) -> bool:
    """Whether the scheme's inputs are rounded by a number from the checkpoint."""
    if isinstance(scheme, LookupScheme):
        return scheme.has_input_scale
    inputs = input_scheme(scheme)
    return inputs is not None and not inputs.dynamic


def with_input_scale(weight: QuantizedWeight, statistics: InputStatistics | None) -> QuantizedWeight:
    """The weight with the `input_scale` that its scheme needs, if it needs one."""
    if not needs_input_scale(weight.scheme):
        return weight
    assert statistics is not None
    scale = _input_scale(weight.scheme, statistics.max_abs.max())
    return replace(weight, tensors={**weight.tensors, "input_scale": scale})


def rounded_inputs(x: Tensor, scheme: Scheme) -> Tensor:
    """Inputs x [T, K] as a layer of this scheme sees them, whose scale, if it has one, was calibrated on x."""
    inputs = input_scheme(scheme)
    if inputs is None:
        return x
    scale = _input_scale(scheme, x.abs().max()) if needs_input_scale(scheme) else None
    return quantize_dequantize(x, inputs, scale)


def _input_scale(scheme: Scheme, largest: Tensor) -> Tensor:
    """What codes of inputs up to `largest` [] are multiplied with, [].

    Of blocks of four-bit floats it is the factor above their e4m3 scales: a power of two, which files that store the
    factor and files that store its reciprocal both hold exactly, and which leaves up to an octave for larger inputs.
    """
    inputs = input_scheme(scheme)
    assert inputs is not None
    if _is_float4(inputs):
        ratio = float(largest) / (E2M1_MAX * E4M3_MAX)
        if not math.isfinite(ratio):
            raise InputError("an input is too large, or not finite: there is no scale for it")
        exponent = max(_LOWEST_EXPONENT, math.ceil(math.log2(ratio))) if ratio > 0 else 0
        return torch.tensor(2.0**exponent, dtype=torch.float64, device=largest.device)
    return fp8_scale(largest) if inputs.kind == "float" else _positive(largest.float() / (2 ** (inputs.bits - 1) - 1))


def fp8_scale(largest: Tensor) -> Tensor:
    """The scale, float32, under which `largest` is the largest FP8 number."""
    return _positive(largest.float() / E4M3_MAX)


def _positive(scale: Tensor) -> Tensor:
    """1 in place of what is too small to divide by."""
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def _is_float4(inputs: ActivationScheme) -> bool:
    return inputs.kind == "float" and inputs.bits == 4
