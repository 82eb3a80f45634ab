"""Codebooks and scales for given codes.

The error of the output is quadratic in the codebooks, so conjugate gradients find their minimum, where Adam's steps
only approach it; and in each row's scale, whose minimum is one division. Neither can make the error larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.calibration.aqlm.state import Additive, sum_by_code
from aphroquant.kernels.reference.matmul import linear

_MIN_SHARE = 1e-4  # of the residual, at which steps end


def fit_codebooks(weight: Tensor, state: Additive, moment: Tensor, steps: int) -> None:
    """Codebooks nearer to the least tr(E H E^T), in place: preconditioned conjugate gradients from where they are."""
    curvature = _curvature(state, moment)
    scale = torch.where(curvature > 0, 1 / curvature.clamp(min=1e-30), 0)
    residual = _pulled(linear(weight - state.weight(), moment), state)
    direction = step = scale * residual
    square = first = (residual * step).sum(dtype=torch.float64)
    for _ in range(steps):
        if not float(square) > float(first) * _MIN_SHARE**2:
            return
        moved = Additive(state.codes, direction, state.scales).weight()
        pulled = linear(moved, moment)
        bend = (moved * pulled).sum(dtype=torch.float64)
        if not float(bend) > 0:
            return
        length = float(square / bend)
        state.books = state.books + length * direction
        residual = residual - length * _pulled(pulled, state)
        step = scale * residual
        before, square = square, (residual * step).sum(dtype=torch.float64)
        direction = step + float(square / before) * direction


def fit_scales(weight: Tensor, state: Additive, moment: Tensor) -> None:
    """The best scale of every row, in place; a row whose entries are all zero keeps its own."""
    sums = state.sums().flatten(1)
    pulled = linear(sums, moment)
    square, product = (sums * pulled).sum(1), (weight * pulled).sum(1)
    state.scales = torch.where((square > 0) & (product > 0), product / square.clamp(min=1e-30), state.scales)


def _pulled(gradient: Tensor, state: Additive) -> Tensor:
    """What a gradient [N, K] of the weight is for the codebooks: [M, E, g]."""
    entries, in_group = state.books.shape[1:]
    groups = (gradient * state.scales[:, None]).view(-1, in_group)
    return torch.stack([sum_by_code(groups, codes, entries) for codes in _flat(state.codes)])


def _curvature(state: Additive, moment: Tensor) -> Tensor:
    """The diagonal of the quadratic form in the codebooks, other groups left out: [M, E, g]."""
    entries, in_group = state.books.shape[1:]
    square = state.scales.square()[:, None] * moment.diagonal()
    return torch.stack([sum_by_code(square.view(-1, in_group), codes, entries) for codes in _flat(state.codes)])


def _flat(codes: Tensor) -> Tensor:
    """[M, N * G]."""
    return codes.flatten(0, 1).T
