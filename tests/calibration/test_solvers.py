"""The registry of solvers."""

from __future__ import annotations

import pytest

from aphroquant.calibration.solvers import SOLVERS, find_solver
from aphroquant.errors import UsageError


def test_every_solver_loads() -> None:
    assert set(SOLVERS) == {"rtn", "gptq", "awq", "awq-gptq", "aqlm"}
    for name, solver in SOLVERS.items():
        assert solver.name == name
        assert callable(solver.load())


def test_an_unknown_name_suggests_and_lists() -> None:
    with pytest.raises(UsageError) as caught:
        find_solver("gtpq")
    assert caught.value.hint == "Did you mean 'gptq'? the solvers are rtn, gptq, awq, awq-gptq, aqlm"
