"""The solvers by name: whether channels are scaled first (AWQ), and how weights are rounded."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from aphroquant.calibration.solution import Rounding
from aphroquant.errors import UsageError


@dataclass(frozen=True)
class Solver:
    """`load` imports the rounding when it is first needed. `summary` is one line for the user."""

    name: str
    summary: str
    load: Callable[[], Rounding]
    scales_channels: bool = False
    needs_second_moment: bool = False


def _lazy(module: str) -> Callable[[], Rounding]:
    def load() -> Rounding:
        return cast(Rounding, importlib.import_module(f"aphroquant.calibration.{module}").solve)

    return load


SOLVERS: Mapping[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("rtn", "round to nearest, ranges searched by E[x**2]", _lazy("rtn")),
        Solver("gptq", "error feedback between columns", _lazy("gptq"), needs_second_moment=True),
        Solver("awq", "channels scaled by activations, then as rtn", _lazy("rtn"), scales_channels=True),
        Solver(
            "awq-gptq",
            "channels scaled by activations, then as gptq",
            _lazy("gptq"),
            scales_channels=True,
            needs_second_moment=True,
        ),
    )
}
FP8_ROUNDING = _lazy("fp8")


def find_solver(name: str) -> Solver:
    """The solver of that name. UsageError listing the known ones."""
    if name not in SOLVERS:
        near = difflib.get_close_matches(name, SOLVERS, n=1)
        known = f"the solvers are {', '.join(SOLVERS)}"
        raise UsageError(f"unknown solver {name!r}", hint=f"Did you mean {near[0]!r}? {known}" if near else known)
    return SOLVERS[name]
