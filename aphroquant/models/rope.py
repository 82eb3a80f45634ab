"""Rotary position embedding: frequencies for every supported scaling, and the rotation itself (half-split layout)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aphroquant.models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """(float32 [head_dim / 2], attention factor that multiplies cos and sin)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.parameters["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(frequencies, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(frequencies, rope, head_dim)
    return frequencies, 1.0


def cos_sin(rope: RopeSpec, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, head_dim / 2], for integer positions [T]."""
    frequencies, factor = inverse_frequencies(rope, head_dim)
    angles = positions[:, None].float() * frequencies[None, :].to(positions.device)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, head_dim]: channel j pairs with channel j + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _llama3(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, the ones between blended."""
    factor = rope.parameters["factor"]
    low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
    original = rope.parameters["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(between, blended, scaled)


def _yarn(frequencies: Tensor, rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate slow channels, extrapolate fast ones, scale the logits."""
    parameters = rope.parameters
    factor = parameters["factor"]
    original = parameters["original_max_position_embeddings"]

    def channel(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = channel(parameters.get("beta_fast") or 32)
    high = channel(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    steps = torch.arange(head_dim // 2, dtype=torch.float32)
    interpolated_share = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    scaled = frequencies / factor * interpolated_share + frequencies * (1 - interpolated_share)

    def logit_scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = logit_scale(mscale) / logit_scale(mscale_all) if mscale and mscale_all else logit_scale(1.0)
    return scaled, float(attention_factor)
