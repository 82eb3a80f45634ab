"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

The error that counts is that of the layer's output, tr(E H E^T) with E = W - rounded W and H = E[x x^T]. With
U = the upper Cholesky factor of H^-1, rounding column i with error e_i costs (e_i / U_ii)**2, provided the later
columns j move by -e_i U_ij / U_ii. Columns are rounded in the order of falling E[x**2], while there are many left to
compensate; scales belong to the original contiguous groups and are fixed beforehand ("static" activation order), so the
result needs no g_idx. Updates inside a block of columns are immediate, those to later blocks one matrix product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.integer_grid import IntegerGrid, expand
from aphroquant.calibration.matmul import linear
from aphroquant.schemes import IntegerScheme

DAMPING = 0.01  # of the mean diagonal, added to the diagonal
DAMPING_GROWTH = 10.0
MAX_DAMPING_RETRIES = 4
BLOCK_SIZE = 64


class HessianFactor(NamedTuple):
    """What rounding needs of a Hessian [K, K], in the order of processing.

    `order` int64 [K] is that order, `upper` float32 [K, K] the factor U with U^T U = H^-1, `damping` the share of the
    mean diagonal that was added, `retries` how often it had to be raised, `dead` how many inputs were always zero.
    """

    order: Tensor
    upper: Tensor
    damping: float
    retries: int
    dead: int


class RoundedWeight(NamedTuple):
    """codes uint8 [N, K] and the proxy loss tr(E H E^T) of each row, float32 [N] (with the damped H)."""

    codes: Tensor
    loss: Tensor


def factorize(second_moment: Tensor, *, damping: float = DAMPING) -> HessianFactor | None:
    """The factor of E[x x^T] [K, K]; None if it is not finite, all zero, or never becomes positive definite.

    Inputs that never fire get a diagonal of their own: their columns are rounded to nearest.
    """
    hessian = second_moment.double()
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian).all() or not (diagonal > 0).any() or (diagonal < 0).any():
        return None
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean())
    order = torch.argsort(diagonal, descending=True, stable=True)
    hessian = hessian[order][:, order]
    share = damping
    for retry in range(MAX_DAMPING_RETRIES + 1):
        damped = hessian.clone()
        damped.diagonal().add_(share * mean).add_(dead[order] * mean)
        upper = _inverse_factor(damped)
        if upper is not None:
            return HessianFactor(order, upper.float(), share, retry, int(dead.sum()))
        share *= DAMPING_GROWTH
    return None


def round_weight(
    weight: Tensor, grid: IntegerGrid, scheme: IntegerScheme, factor: HessianFactor, *, block_size: int = BLOCK_SIZE
) -> RoundedWeight:
    """Round weight [N, K] onto the grid. The block size changes the speed, and results only by float rounding."""
    order, upper = factor.order, factor.upper
    scales, zeros = (part[:, order].T.contiguous() for part in expand(grid, scheme, weight.shape[1]))
    columns = weight.float()[:, order].T.contiguous()  # [K, N]: a column of the weight is one row of memory
    codes = torch.empty_like(columns)
    loss = torch.zeros(weight.shape[0], device=weight.device)
    for start in range(0, columns.shape[0], block_size):
        end = min(start + block_size, columns.shape[0])
        errors = torch.empty_like(columns[start:end])
        for column in range(start, end):
            value, scale, zero = columns[column], scales[column], zeros[column]
            code = (value / scale).add_(zero).round_().clamp_(0, 2**scheme.bits - 1)
            error = value.addcmul(code - zero, scale, value=-1).div_(upper[column, column])
            codes[column], errors[column - start] = code, error
            loss.addcmul_(error, error)
            columns[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
        if end < columns.shape[0]:
            columns[end:] -= linear(upper[start:end, end:].T, errors.T)
    unordered = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    unordered[:, order] = codes.T.to(torch.uint8)
    return RoundedWeight(unordered, loss)


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """U upper triangular with U^T U = matrix^-1, or None: matrix = R R^T with R upper triangular, and U = R^-1."""
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed):
        return None
    reverse = lower.flip(0, 1)
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    upper = torch.linalg.solve_triangular(reverse, identity, upper=True)
    return upper if torch.isfinite(upper).all() else None
