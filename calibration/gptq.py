"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

The error that counts is that of the layer's output, tr(E H E^T) with E = W - rounded W and H = E[x x^T]. With
U = the upper Cholesky factor of H^-1, rounding column i with error e_i costs (e_i / U_ii)**2, provided the later
columns j move by -e_i U_ij / U_ii. Columns are rounded in the order of falling E[x**2], while there are many left to
compensate; scales belong to the original contiguous groups and are fixed beforehand ("static" activation order), so the
result needs no g_idx. Updates inside a block of columns are immediate, those to later blocks one matrix product.

Measured on SmolLM2-135M with function-preserving transformations that take it off its original grid (4 bits, groups of
64 with zero points; calibration 128 x 512 tokens of speeches; mean KL divergence on 8 x 1024 tokens of Wikipedia):
grids that cover each group's range 0.304; grids searched with weights E[x**2] 0.212; with the conditional variances
1 / U_ii**2, which lower the proxy loss most, 0.236. After AWQ's scaling the damping decides how much of the calibration
text's peculiarities is learnt: 0.150 with 0.01, 0.132 with 0.1; without the scaling the two are equal (0.212).
Repeated sweeps over all codes with refitted scales lower the proxy loss by 5 % more, and the divergence not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration import rtn
from aphroquant.calibration.grids import Points, searched_grids
from aphroquant.calibration.inputs import with_input_scale
from aphroquant.calibration.replay import Replayed
from aphroquant.calibration.solution import Solution, relative_error
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.kernels.reference.matmul import linear
from aphroquant.schemes import Scheme

DAMPING = 0.1  # of the mean diagonal, added to the diagonal
DAMPING_GROWTH = 10.0
MAX_DAMPING_RETRIES = 3
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


def solve(
    weights: Sequence[Tensor], statistics: InputStatistics | None, scheme: Scheme, scale_dtype: torch.dtype
) -> list[Solution]:
    """Weights [N, K] that share an input, rounded with error feedback; to nearest if the Hessian cannot be used."""
    assert statistics is not None
    assert statistics.second_moment is not None
    factor = factorize(statistics.second_moment)
    if factor is None:
        return [_without_feedback(solution) for solution in rtn.solve(weights, statistics, scheme, scale_dtype)]
    grids = searched_grids(weights, statistics.mean_square, scheme, scale_dtype)
    rounded = round_weight(torch.cat([weight.float() for weight in weights]), [grid.points() for grid in grids], factor)
    solutions, first = [], 0
    for weight, grid in zip(weights, grids, strict=True):
        rows = slice(first, first + weight.shape[0])
        codes = rounded.codes[rows]
        error = relative_error(weight, grid.decode(codes), statistics)
        details = _details(factor) | {"proxy_loss": float(rounded.loss[rows].sum())}
        quantized = with_input_scale(grid.quantized(codes), statistics)
        solutions.append(Solution(quantized, error, details, _warnings(factor)))
        first = rows.stop
    return solutions


def factorize(second_moment: Tensor, *, damping: float = DAMPING) -> HessianFactor | None:
    """The factor of E[x x^T] [K, K]; None if it is not finite, all zero, or never becomes positive definite.

    Inputs that never fire get a diagonal of their own: their columns are rounded to nearest.
    """
    diagonal = second_moment.diagonal().double()
    if not torch.isfinite(second_moment).all() or not (diagonal > 0).any() or (diagonal < 0).any():
        return None
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean())
    order = torch.argsort(diagonal, descending=True, stable=True)
    backwards = order.flip(0)
    matrix = second_moment[backwards][:, backwards].double()  # with large layers, copies of this are what costs memory
    share = damping
    for retry in range(MAX_DAMPING_RETRIES + 1):
        matrix.diagonal().copy_(diagonal[backwards] + share * mean + dead[backwards] * mean)
        upper = _inverse_factor(matrix)
        if upper is not None:
            return HessianFactor(order, upper, share, retry, int(dead.sum()))
        share *= DAMPING_GROWTH
    return None


def round_weight(
    weight: Tensor, points: Sequence[Points], factor: HessianFactor, *, block_size: int = BLOCK_SIZE
) -> RoundedWeight:
    """Round weight [N, K] to points, those of several weights standing for rows below each other, all of one kind.

    The block size changes the speed, and results only by float rounding.
    """
    order, upper = factor.order, factor.upper
    parameters = [
        torch.cat(parts)[:, order].T.contiguous() for parts in zip(*(part.parameters for part in points), strict=True)
    ]
    columns = weight.float()[:, order].T.contiguous()  # [K, N]: a column of the weight is one row of memory
    codes = torch.empty_like(columns)
    loss = torch.zeros(weight.shape[0], device=weight.device)
    whole = _ColumnBlock(block_size, weight.shape[0], points[0], weight.device)
    for start in range(0, columns.shape[0], block_size):
        end = min(start + block_size, columns.shape[0])
        full = end - start == block_size
        block = whole if full else _ColumnBlock(end - start, weight.shape[0], points[0], weight.device)
        block.round(columns[start:end], [part[start:end] for part in parameters], upper[start:end, start:end])
        codes[start:end] = block.codes
        loss += block.errors.square().sum(0)
        if end < columns.shape[0]:
            columns[end:] -= linear(upper[start:end, end:].T, block.errors.T)
        if not full:
            block.release()
    whole.release()
    unordered = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    unordered[:, order] = codes.T.to(torch.uint8)
    return RoundedWeight(unordered, loss)


class _ColumnBlock:
    """Columns [B, N] that are rounded one after the other, each making up for the errors before it in the block.

    `codes` and `errors` (divided by the factor's diagonal) are what the last call found, [B, N].
    """

    def __init__(self, size: int, num_rows: int, points: Points, device: torch.device) -> None:
        self._points = points
        self._values, self.codes, self.errors, *self._parameters = torch.empty(
            3 + len(points.parameters), size, num_rows, device=device
        )
        self._upper = torch.empty(size, size, device=device)
        self._replayed = Replayed(self._round, device)

    def round(self, values: Tensor, parameters: Sequence[Tensor], upper: Tensor) -> None:
        own = (self._values, *self._parameters, self._upper)
        for mine, given in zip(own, (values, *parameters, upper), strict=True):
            mine.copy_(given)
        self._replayed()

    def release(self) -> None:
        """Free what a recording holds."""
        self._replayed.release()

    def _round(self) -> None:
        for column, value in enumerate(self._values):
            error = self.errors[column]
            self._points.round(value, [part[column] for part in self._parameters], self.codes[column], error)
            error.div_(self._upper[column, column])
            self._values[column + 1 :].addr_(self._upper[column, column + 1 :], error, alpha=-1)


def _inverse_factor(backwards: Tensor) -> Tensor | None:
    """U float32 upper triangular with U^T U = H^-1, or None, for H with its rows and columns in reverse order.

    The lower Cholesky factor L of that is R of H = R R^T in reverse, R upper triangular; and U = R^-1.
    """
    lower, failed = torch.linalg.cholesky_ex(backwards)
    if int(failed):
        return None
    inverse = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    return inverse.float().flip(0, 1) if torch.isfinite(inverse).all() else None


def _details(factor: HessianFactor) -> dict[str, object]:
    return {
        "rounding": "gptq",
        "damping": factor.damping,
        "damping_retries": factor.retries,
        "dead_inputs": factor.dead,
    }


def _warnings(factor: HessianFactor) -> tuple[str, ...]:
    if not factor.retries:
        return ()
    return (f"the Hessian is nearly singular: damping raised {factor.retries} times, to {factor.damping:g}",)


def _without_feedback(solution: Solution) -> Solution:
    """What becomes of a layer whose Hessian is zero, not finite, or singular whatever is added to it."""
    warning = "the Hessian is zero or not usable: rounded to nearest, without error feedback"
    return Solution(solution.weight, solution.relative_error, solution.details | {"fallback": warning}, (warning,))
