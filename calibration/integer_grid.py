"""Integer grids: the scales and zero points of a weight's groups, the codes on them, and the search for good ones.

W = (codes - zeros) * scales, one scale and zero point for `group_size` neighbouring columns of a row. Scales are kept
in float32 but hold only values of the dtype that the checkpoint will store, so that what a solver sees is what a reader
gets. Zero points are whole numbers in float32. The last group of a row may be shorter than the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.schemes import IntegerScheme, QuantizedWeight

_CHUNK_ELEMENTS = 1 << 17  # of a search: its temporaries then stay in the processor's cache
_GPU_CHUNK_ELEMENTS = 1 << 25  # enough to fill a GPU, few enough for its memory
_NUM_SHARES = 20
_SMALLEST_SHARE = {1: 0.2, 2: 0.3, 3: 0.5, 4: 0.6}


class IntegerGrid(NamedTuple):
    """scales and zeros, float32 [N, G] (zeros are 2**(bits - 1) throughout if the scheme is symmetric)."""

    scales: Tensor
    zeros: Tensor


class IntegerPoints(NamedTuple):
    """The points of a weight, scale and zero point spread to every element, float32 [N, K]."""

    parameters: tuple[Tensor, ...]
    highest: int

    def round(self, values: Tensor, parameters: Sequence[Tensor], codes: Tensor, errors: Tensor) -> None:
        scale, zero = parameters
        torch.div(values, scale, out=codes).add_(zero).round_().clamp_(0, self.highest)
        torch.sub(zero, codes, out=errors).mul_(scale).add_(values)


@dataclass(frozen=True)
class IntegerWeightGrid:
    """An integer grid as a `WeightGrid`."""

    grid: IntegerGrid
    scheme: IntegerScheme
    scale_dtype: torch.dtype
    width: int

    def nearest(self, weight: Tensor) -> Tensor:
        return quantize(weight, self.grid, self.scheme)

    def decode(self, codes: Tensor) -> Tensor:
        return dequantize(codes, self.grid, self.scheme)

    def points(self) -> IntegerPoints:
        return IntegerPoints(tuple(expand(self.grid, self.scheme, self.width)), 2**self.scheme.bits - 1)

    def quantized(self, codes: Tensor) -> QuantizedWeight:
        return to_quantized_weight(codes, self.grid, self.scheme, self.scale_dtype)


def min_max_grid(weight: Tensor, scheme: IntegerScheme, scale_dtype: torch.dtype = torch.float16) -> IntegerGrid:
    """The grid that just covers each group's values; a symmetric one reaches as far below zero as above it."""
    groups = split_groups(weight, scheme)
    low, high = _range(groups)
    if scheme.symmetric:
        half = 2 ** (scheme.bits - 1)
        scales = torch.maximum(-low, high) / (half - 0.5)
        return IntegerGrid(stored_scales(scales, scale_dtype), torch.full_like(scales, half))
    levels = 2**scheme.bits - 1
    scales = stored_scales((high - low) / levels, scale_dtype)
    return IntegerGrid(scales, (-low / scales).round().clamp(0, levels))


def search_grid(
    weight: Tensor, importance: Tensor, scheme: IntegerScheme, scale_dtype: torch.dtype = torch.float16
) -> IntegerGrid:
    """The grid with the least sum of importance * (rounding error)**2 per group, among shrunken and shifted ranges.

    importance [K] (or [N, K]) is what an error in a column costs, such as E[x**2]. Symmetric schemes are searched over
    both signs of the scale, because the grid -2**(bits-1) .. 2**(bits-1) - 1 reaches further to one side.
    """
    groups = split_groups(weight, scheme)  # [N, G, g]
    weights = split_groups(importance.expand_as(weight) if importance.dim() == 2 else importance[None], scheme)
    scales, zeros = torch.empty(groups.shape[:2]), torch.empty(groups.shape[:2])
    scales, zeros = scales.to(weight.device), zeros.to(weight.device)
    elements = _CHUNK_ELEMENTS if weight.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    rows = max(1, elements // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        chosen = _search_rows(groups[part], weights if weights.shape[0] == 1 else weights[part], scheme, scale_dtype)
        scales[part], zeros[part] = chosen
    return IntegerGrid(scales, zeros)


def quantize(weight: Tensor, grid: IntegerGrid, scheme: IntegerScheme) -> Tensor:
    """The nearest codes, uint8 [N, K]."""
    codes = (split_groups(weight, scheme) / grid.scales[..., None]).add_(grid.zeros[..., None])  # [N, G, g]
    return join_groups(codes.round_().clamp_(0, 2**scheme.bits - 1).to(torch.uint8), weight.shape[1])


def dequantize(codes: Tensor, grid: IntegerGrid, scheme: IntegerScheme) -> Tensor:
    """The weight [N, K] in float32 that codes stand for."""
    values = (split_groups(codes, scheme) - grid.zeros[..., None]).mul_(grid.scales[..., None])
    return join_groups(values, codes.shape[1])


def expand(grid: IntegerGrid, scheme: IntegerScheme, in_features: int) -> IntegerGrid:
    """The grid with one column per input column, [N, K]."""
    index = torch.arange(in_features, device=grid.scales.device) // (scheme.group_size or in_features)
    return IntegerGrid(grid.scales[:, index], grid.zeros[:, index])


def to_quantized_weight(
    codes: Tensor, grid: IntegerGrid, scheme: IntegerScheme, scale_dtype: torch.dtype = torch.float16
) -> QuantizedWeight:
    """The canonical form: the scales in their stored dtype, the zero points as uint8 unless symmetric."""
    tensors = {"codes": codes.contiguous(), "scales": grid.scales.to(scale_dtype).contiguous()}
    if not scheme.symmetric:
        tensors["zeros"] = grid.zeros.to(torch.uint8).contiguous()
    return QuantizedWeight(scheme, tensors, (codes.shape[0], codes.shape[1]))


def split_groups(matrix: Tensor, scheme: IntegerScheme) -> Tensor:
    """[N, K] -> [N, G, g], the last group filled up with zeros, which every grid holds exactly."""
    size = scheme.group_size or matrix.shape[1]
    padding = -matrix.shape[1] % size
    padded = torch.nn.functional.pad(matrix.float(), (0, padding)) if padding else matrix.float()
    return padded.reshape(matrix.shape[0], -1, size)


def join_groups(groups: Tensor, width: int) -> Tensor:
    """[N, G, g] -> [N, K]; inverse of split_groups."""
    return groups.reshape(groups.shape[0], -1)[:, :width]


def _range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each group, widened to hold zero: zero points are codes."""
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as the dtype holds them; 1 where a group is all zeros (or too small for the dtype)."""
    rounded = scales.to(dtype).float()
    if not torch.isfinite(rounded).all():
        raise too_large(dtype)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def smallest_share(bits: int) -> float:
    """The smallest part of a group's range that is worth trying."""
    return _SMALLEST_SHARE.get(bits, 0.7)


def too_large(dtype: torch.dtype) -> InputError:
    """The error of a scale that its dtype cannot hold."""
    return InputError(f"a weight is too large, or not finite: its scale does not fit into {dtype}")


def _search_rows(
    groups: Tensor, importance: Tensor, scheme: IntegerScheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Best (scales, zeros) [n, G] of groups [n, G, g] among the candidates."""
    best_error = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    best_scales, best_zeros = torch.ones_like(best_error), torch.zeros_like(best_error)
    for scales, zeros in _candidates(groups, scheme, scale_dtype):
        error = _rounding_error(groups, importance, scales, zeros, 2**scheme.bits - 1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def _candidates(groups: Tensor, scheme: IntegerScheme, scale_dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """(scales, zeros), both [n, G], from the whole range down to a small part of it."""
    low, high = _range(groups)
    smallest = smallest_share(scheme.bits)
    shares = [1.0 - (1.0 - smallest) * step / (_NUM_SHARES - 1) for step in range(_NUM_SHARES)]
    if scheme.symmetric:
        half = 2 ** (scheme.bits - 1)
        # The code -half is used by the value of the largest magnitude: a positive one gets a negative scale.
        extreme = torch.where(-low > high, low, high)
        zeros = torch.full_like(low, half)
        for share in shares:
            for reach in (half, -(half - 1)):
                yield stored_scales(-extreme * share / reach, scale_dtype), zeros
        return
    levels = 2**scheme.bits - 1
    for share in shares:
        scales = stored_scales((high - low) * share / levels, scale_dtype)
        centre = (-low * share / scales).round()
        for shift in (0, -1, 1):
            yield scales, (centre + shift).clamp(0, levels)


def _rounding_error(groups: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    """Sum over each group of importance * (rounded - value)**2, [n, G]."""
    scales, zeros = scales[..., None], zeros[..., None]
    rounded = (groups / scales).round_()
    rounded.clamp_(-zeros, levels - zeros).mul_(scales).sub_(groups).square_()
    return (rounded * importance).sum(-1)
