"""Encoders of the K-quants. Each takes x and weights [B, 256].

First every sub-block gets its own best real scale (and minimum). These become small integers times a factor that the
super-block shares; then factors and integers are improved in turn: the factors are the least-squares solution for the
integers and codes at hand, and each sub-block tries the integers next to its own, coding its elements anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.formats.gguf.grids import affine_codes, fit_affine, fit_symmetric, symmetric_codes
from aphroquant.schemes import KQuantScheme

_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal


def encode_affine(x: Tensor, weights: Tensor, scheme: KQuantScheme) -> dict[str, Tensor]:
    """Q2_K, Q4_K and Q5_K."""
    search = _AffineSuperBlocks(_sub_blocks(x, scheme), _sub_blocks(weights, scheme), scheme)
    search.try_neighbours()
    search.refit_factors()
    search.try_neighbours()
    return search.result()


def encode_symmetric(x: Tensor, weights: Tensor, scheme: KQuantScheme) -> dict[str, Tensor]:
    """Q3_K and Q6_K."""
    search = _SymmetricSuperBlocks(_sub_blocks(x, scheme), _sub_blocks(weights, scheme), scheme)
    search.try_neighbours()
    search.refit_factor()
    search.try_neighbours()
    return search.result()


class _AffineSuperBlocks:
    """x [B, S, n] ~ d * scales * codes - dmin * mins: d, dmin [B, 1] in float16, scales and mins integers [B, S]."""

    def __init__(self, x: Tensor, weights: Tensor, scheme: KQuantScheme) -> None:
        self.x, self.weights = x, weights
        self.levels, self.limit = 2**scheme.bits - 1, 2**scheme.scale_bits - 1
        scale, minimum = fit_affine(x.flatten(0, 1), weights.flatten(0, 1), self.levels)
        scale, depth = scale.view(x.shape[:2]), -minimum.view(x.shape[:2])
        self.d = _reaching(scale.amax(dim=-1, keepdim=True) / self.limit)
        self.dmin = _reaching(depth.amax(dim=-1, keepdim=True) / self.limit)
        self.scales = _integers(scale, self.d, 0, self.limit)
        self.mins = _integers(depth, self.dmin, 0, self.limit)

    def try_neighbours(self) -> None:
        """Give each sub-block the scale, its own or one beside it, and then the minimum, of the least error."""
        total = self.weights.sum(dim=-1)
        own_scales, own_mins = self.scales, self.mins
        least = self._error(self.d, self.dmin, own_scales, own_mins)
        for change in (0, -1, 1):
            scales = (own_scales + change).clamp_(0, self.limit)
            step = self.d * scales
            codes = self._codes(step, self.dmin * own_mins)
            rest = step[..., None] * codes - self.x
            depth = rest.mul_(self.weights).sum(dim=-1) / total
            mins = _integers(depth, self.dmin, 0, self.limit)
            error = self._error(self.d, self.dmin, scales, mins)
            better = error < least
            least = torch.where(better, error, least)
            self.scales = torch.where(better, scales, self.scales)
            self.mins = torch.where(better, mins, self.mins)

    def refit_factors(self) -> None:
        """Give each super-block the factors that suit its integers and codes best, where that helps."""
        codes = self._codes(self.d * self.scales, self.dmin * self.mins)
        up = codes * self.scales[..., None]  # x ~ d up - dmin down
        down = self.mins[..., None].expand_as(up)
        up_up, up_down, down_down = self._dot(up, up), self._dot(up, down), self._dot(down, down)
        up_x, down_x = self._dot(up, self.x), self._dot(down, self.x)
        determinant = up_up * down_down - up_down * up_down
        d = _as_half((down_down * up_x - up_down * down_x) / determinant)
        dmin = _as_half((up_down * up_x - up_up * down_x) / determinant)
        new = self._error(d, dmin, self.scales, self.mins).sum(dim=-1, keepdim=True)
        old = self._error(self.d, self.dmin, self.scales, self.mins).sum(dim=-1, keepdim=True)
        better = (new < old) & (d >= 0) & (dmin >= 0)  # false where there is no solution
        self.d, self.dmin = torch.where(better, d, self.d), torch.where(better, dmin, self.dmin)

    def result(self) -> dict[str, Tensor]:
        return {
            "codes": self._codes(self.d * self.scales, self.dmin * self.mins).byte().flatten(1),
            "d": self.d.half(),
            "dmin": self.dmin.half(),
            "sub_scales": self.scales.byte(),
            "sub_mins": self.mins.byte(),
        }

    def _codes(self, step: Tensor, depth: Tensor) -> Tensor:
        return affine_codes(self.x, step[..., None], -depth[..., None], self.levels)

    def _error(self, d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor) -> Tensor:
        """Of each sub-block, [B, S]."""
        step, depth = d * scales, dmin * mins
        found = self._codes(step, depth).mul_(step[..., None]).sub_(depth[..., None])
        return found.sub_(self.x).square_().mul_(self.weights).sum(dim=-1)

    def _dot(self, first: Tensor, second: Tensor) -> Tensor:
        return (first * second).mul_(self.weights).sum(dim=(-1, -2))[:, None]


class _SymmetricSuperBlocks:
    """x [B, S, n] ~ d * scales * codes: d [B, 1] in float16, scales integers [B, S] of either sign."""

    def __init__(self, x: Tensor, weights: Tensor, scheme: KQuantScheme) -> None:
        assert scheme.zero is not None
        self.x, self.weights, self.zero = x, weights, scheme.zero
        self.lowest = -(2 ** (scheme.scale_bits - 1))
        scale = fit_symmetric(x.flatten(0, 1), weights.flatten(0, 1), -self.zero, self.zero - 1).view(x.shape[:2])
        extreme = scale.gather(-1, scale.abs().argmax(dim=-1, keepdim=True))
        self.d = _reaching(extreme / self.lowest)
        self.scales = _integers(scale, self.d, self.lowest, -self.lowest - 1)

    def try_neighbours(self) -> None:
        """Give each sub-block the scale, its own or one beside it, of the least error."""
        own, least = self.scales, self._error(self.d, self.scales)
        for change in (-1, 1):
            scales = (own + change).clamp_(self.lowest, -self.lowest - 1)
            error = self._error(self.d, scales)
            better = error < least
            least = torch.where(better, error, least)
            self.scales = torch.where(better, scales, self.scales)

    def refit_factor(self) -> None:
        """Give each super-block the factor that suits its integers and codes best, where that helps."""
        up = self._codes(self.d * self.scales).mul_(self.scales[..., None])
        weighted = up * self.weights
        d = _as_half(((weighted * self.x).sum(dim=(-1, -2)) / (weighted * up).sum(dim=(-1, -2)))[:, None])
        new, old = (self._error(factor, self.scales).sum(dim=-1, keepdim=True) for factor in (d, self.d))
        self.d = torch.where(new < old, d, self.d)

    def result(self) -> dict[str, Tensor]:
        codes = self._codes(self.d * self.scales) + self.zero
        return {"codes": codes.byte().flatten(1), "d": self.d.half(), "sub_scales": self.scales.to(torch.int8)}

    def _codes(self, step: Tensor) -> Tensor:
        return symmetric_codes(self.x, step[..., None], -self.zero, self.zero - 1)

    def _error(self, d: Tensor, scales: Tensor) -> Tensor:
        """Of each sub-block, [B, S]."""
        step = d * scales
        found = self._codes(step).mul_(step[..., None])
        return found.sub_(self.x).square_().mul_(self.weights).sum(dim=-1)


def _sub_blocks(x: Tensor, scheme: KQuantScheme) -> Tensor:
    return x.view(x.shape[0], -1, scheme.sub_block)


def _as_half(x: Tensor) -> Tensor:
    """float32 that float16 can hold."""
    return x.half().float()


def _reaching(x: Tensor) -> Tensor:
    """float32 that float16 can hold, of at least the magnitude of x where float16 is coarse.

    Of small weights nearly all factors are subnormal. One that is rounded to less, or to zero, would leave the largest
    sub-block out of its integers' reach; one that is greater makes them a little smaller.
    """
    near = x.half()
    away = (near.view(torch.int16) + 1).view(torch.float16)  # the next number, of the same sign
    return torch.where((near.abs() < x.abs()) & (x.abs() < _SMALLEST_NORMAL), away, near).float()


def _integers(x: Tensor, factor: Tensor, low: int, high: int) -> Tensor:
    return torch.where(factor == 0, 0.0, x / factor).round_().clamp_(low, high)
