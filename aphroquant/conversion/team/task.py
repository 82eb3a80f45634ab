"""Solving as a task of its own: what it needs and nothing else, so that it can be done anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aphroquant.calibration.solution import Solution
from aphroquant.calibration.solvers import find_solver, rounding_for, two_sided_rounding
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.schemes import Scheme


@dataclass(frozen=True)
class SolveTask:
    """Weights [N, K] by module, of layers that share an input and get the same. `moments` are of their outputs, where
    the solver wants them."""

    weights: Mapping[str, Tensor]
    statistics: InputStatistics | None
    scheme: Scheme
    solver: str
    scale_dtype: torch.dtype
    moments: list[Tensor | None] | None = None

    def solve(self) -> dict[str, Solution]:
        """Solutions by module."""
        weights, solver = list(self.weights.values()), find_solver(self.solver)
        if self.moments is not None:
            rounding = two_sided_rounding(self.scheme, solver)
            solved = rounding(weights, self.statistics, self.scheme, self.scale_dtype, self.moments)
        else:
            solved = rounding_for(self.scheme, solver)(weights, self.statistics, self.scheme, self.scale_dtype)
        return dict(zip(self.weights, solved, strict=True))

    def to(self, device: torch.device) -> SolveTask:
        """The same task on a device."""
        statistics = self.statistics
        if statistics is not None:
            moved = [None if tensor is None else tensor.to(device) for tensor in statistics[1:]]
            statistics = InputStatistics(statistics.num_tokens, *moved)  # type: ignore[arg-type]
        moments = self.moments and [None if moment is None else moment.to(device) for moment in self.moments]
        weights = {module: weight.to(device) for module, weight in self.weights.items()}
        return replace(self, weights=weights, statistics=statistics, moments=moments)
