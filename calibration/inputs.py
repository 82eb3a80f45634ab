"""Static scales of inputs, from the greatest magnitude that calibration has seen."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from aphroquant.calibration.statistics import InputStatistics
from aphroquant.schemes import ActivationScheme, QuantizedWeight
from aphroquant.schemes.lookup import LookupScheme

E4M3_MAX, E2M1_MAX = 448.0, 6.0


def with_input_scale(weight: QuantizedWeight, statistics: InputStatistics | None) -> QuantizedWeight:
    """The weight with the `input_scale` that its scheme wants, if it wants one."""
    activations = getattr(weight.scheme, "activations", None)
    if activations is None or not _is_static(weight, activations):
        return weight
    assert statistics is not None
    return replace(weight, tensors={**weight.tensors, "input_scale": input_scale(activations, statistics.max_abs)})


def input_scale(activations: ActivationScheme, max_abs: Tensor) -> Tensor:
    """What codes of inputs are multiplied with, [], for inputs of at most max_abs [K].

    Of blocks of four-bit floats it is the factor above their e4m3 scales: a power of two, which files that store the
    factor and files that store its reciprocal both hold exactly, and which leaves up to an octave for larger inputs.
    """
    largest = max_abs.max() if max_abs.numel() else torch.zeros(())
    if activations.bits == 4 and activations.kind == "float":
        ratio = float(largest) / (E2M1_MAX * E4M3_MAX)
        return torch.tensor(2.0 ** max(-126, math.ceil(math.log2(ratio))) if ratio > 0 else 1.0, dtype=torch.float64)
    highest = E4M3_MAX if activations.kind == "float" else 2 ** (activations.bits - 1) - 1
    scale = largest.float() / highest
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def _is_static(weight: QuantizedWeight, activations: ActivationScheme) -> bool:
    if isinstance(weight.scheme, LookupScheme):
        return weight.scheme.has_input_scale
    return not activations.dynamic
