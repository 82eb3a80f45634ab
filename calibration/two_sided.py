"""Rounding with feedback to both sides: what one output's errors cost depends on the errors of the others.

GPTQ takes an output's error to cost the same whatever the others do. To the divergence of the model's logits it does
not: to second order E costs tr(H_O E H_I E^T), with H_I = E[x x^T] of the inputs and H_O = E[g g^T] of the gradients by
the outputs, in the Kronecker-factored approximation of the Fisher matrix (YAQA, arXiv 2505.22988).

With U^T U = H^-1 for either side (upper triangular, in the order of falling curvature) and V = diag(U)^-1 U, the cost
is that of R = V_O^-T E V_I^-1, each entry by itself. Entry (i, j) of R is what rounding leaves of a target there,

    R = target - rounded,   target = W - (V_O^T R V_I - R),

where only entries count that are neither below nor to the right: those of one anti-diagonal can be rounded at once, as
published. Here tiles on one anti-diagonal are taken together, anti-diagonal by anti-diagonal within them, and what
earlier tiles do to a tile is two products: of R with V_I in its rows, and of V_O with M = R V_I in its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration import gptq
from aphroquant.calibration.gptq import HessianFactor
from aphroquant.calibration.grids import searched_grids
from aphroquant.calibration.inputs import with_input_scale
from aphroquant.calibration.integer_grid import IntegerWeightGrid
from aphroquant.calibration.solution import Solution, relative_error
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.schemes import IntegerScheme, Scheme

OUTPUT_DAMPING = 0.1  # of the mean diagonal of H_O
TILE = 32


class TwoSidedCodes(NamedTuple):
    """codes uint8 [N, K] and the cost tr(H_O E H_I E^T) that is left (with the damped matrices)."""

    codes: Tensor
    loss: float


def solve(
    weights: Sequence[Tensor],
    statistics: InputStatistics | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    output_moments: Sequence[Tensor | None] = (),
) -> list[Solution]:
    """As `gptq.solve`, with H_O [N, N] of each weight; without one that can be used, it is left to GPTQ."""
    assert isinstance(scheme, IntegerScheme)
    assert statistics is not None and statistics.second_moment is not None
    inputs = gptq.factorize(statistics.second_moment)
    outputs = [None if moment is None else gptq.factorize(moment, damping=OUTPUT_DAMPING) for moment in output_moments]
    if inputs is None or not any(outputs):
        return gptq.solve(weights, statistics, scheme, scale_dtype)
    solutions = []
    for weight, factor in zip(weights, outputs, strict=True):
        if factor is None:
            solutions += gptq.solve([weight], statistics, scheme, scale_dtype)
            continue
        grid = searched_grids([weight], statistics.mean_square, scheme, scale_dtype)[0]
        assert isinstance(grid, IntegerWeightGrid)
        found = round_two_sided(weight.float(), grid, inputs, factor)
        error = relative_error(weight, grid.decode(found.codes), statistics)
        details = {
            "rounding": "two-sided",
            "damping": inputs.damping,
            "output_damping": factor.damping,
            "dead_inputs": inputs.dead,
            "proxy_loss": found.loss,
        }
        solutions.append(Solution(with_input_scale(grid.quantized(found.codes), statistics), error, details))
    return solutions


def round_two_sided(
    weight: Tensor, grid: IntegerWeightGrid, inputs: HessianFactor, outputs: HessianFactor, *, tile: int = TILE
) -> TwoSidedCodes:
    """Round weight [N, K] onto the grid. The size of tiles changes the speed, and results only by float rounding."""
    rows, columns = outputs.order, inputs.order
    weight, scales, zeros = (part[rows][:, columns] for part in (weight, *grid.points().parameters))
    work = _Sweep(weight, scales, zeros, unit_upper(outputs), unit_upper(inputs), grid.scheme, tile)
    for wave in range(work.num_rows + work.num_columns - 1):
        work.round_wave(wave)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    codes[rows[:, None], columns] = work.codes[: weight.shape[0], : weight.shape[1]].to(torch.uint8)
    left = work.residual[: weight.shape[0], : weight.shape[1]] / inputs.upper.diagonal()
    return TwoSidedCodes(codes, float((left / outputs.upper.diagonal()[:, None]).square().sum()))


def unit_upper(factor: HessianFactor) -> Tensor:
    """V [n, n]: the factor with its rows divided by its diagonal."""
    return factor.upper / factor.upper.diagonal()[:, None]


class _Sweep:
    """A weight [N, K] in the order of processing, padded to whole tiles with entries that are exactly 0."""

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor,
        by_output: Tensor,
        by_input: Tensor,
        scheme: IntegerScheme,
        tile: int,
    ) -> None:
        self._tile, self._highest = tile, 2**scheme.bits - 1
        self._values, self._zeros = (_padded(part, tile) for part in (weight, zeros))
        self._scales = _padded(scales, tile, 1.0)
        self._by_output, self._by_input = (_padded(part, tile) for part in (by_output, by_input))
        self.num_rows, self.num_columns = self._values.shape[0] // tile, self._values.shape[1] // tile
        self.codes, self.residual, self._by_rows = torch.zeros(3, *self._values.shape, device=weight.device)

    def round_wave(self, wave: int) -> None:
        """The tiles on one anti-diagonal."""
        first, last = max(0, wave - self.num_columns + 1), min(wave, self.num_rows - 1)
        places = [(self._span(row), self._span(wave - row)) for row in range(first, last + 1)]
        left = torch.stack([self.residual[r, : c.start] @ self._by_input[: c.start, c] for r, c in places])
        above = torch.stack([self._by_rows[: r.start, c].T @ self._by_output[: r.start, r] for r, c in places])
        values, scales, zeros = (
            torch.stack([part[place] for place in places]) for part in (self._values, self._scales, self._zeros)
        )
        by_input = torch.stack([self._by_input[c, c] for _, c in places]).triu(1)  # [n, tile, tile]
        by_output = torch.stack([self._by_output[r, r] for r, _ in places]).triu(1)
        codes, residual, by_rows = torch.empty(3, *values.shape, device=values.device)
        for step in range(2 * self._tile - 1):
            low, high = max(0, step - self._tile + 1), min(step, self._tile - 1) + 1
            rows = torch.arange(low, high, device=values.device)
            columns = step - rows
            target = values[:, rows, columns] - left[:, rows, columns] - above[:, columns, rows]  # [n, entries]
            scale, zero = scales[:, rows, columns], zeros[:, rows, columns]
            code = (target / scale).add_(zero).round_().clamp_(0, self._highest)
            error = target - (code - zero) * scale
            summed = left[:, rows, columns] + error
            codes[:, rows, columns], residual[:, rows, columns], by_rows[:, rows, columns] = code, error, summed
            left[:, low:high] += error[..., None] * by_input[:, columns]
            above[:, columns] += summed[..., None] * by_output[:, low:high]
        for number, place in enumerate(places):
            self.codes[place], self.residual[place], self._by_rows[place] = (
                part[number] for part in (codes, residual, by_rows)
            )

    def _span(self, number: int) -> slice:
        return slice(number * self._tile, (number + 1) * self._tile)


def _padded(matrix: Tensor, tile: int, value: float = 0.0) -> Tensor:
    """A matrix [n, m] with rows and columns added up to whole tiles."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % tile, 0, -matrix.shape[0] % tile), value=value)
