"""The registry of solvers."""

from __future__ import annotations

import pytest

from aphroquant.calibration.solvers import SOLVERS, find_solver, rounding_for
from aphroquant.errors import UsageError
from aphroquant.schemes import AdditiveScheme, AffineScheme, FloatScheme, IntegerScheme, LookupScheme, Scheme

SCHEMES: dict[type, Scheme] = {
    IntegerScheme: IntegerScheme(4, 64, False),
    LookupScheme: LookupScheme("e2m1", 16, "e4m3"),
    FloatScheme: FloatScheme("channel"),
    AdditiveScheme: AdditiveScheme(2, 8),
    AffineScheme: AffineScheme(4, 64),
}


def test_every_solver_loads() -> None:
    assert set(SOLVERS) == {
        "rtn",
        "mse",
        "hqq",
        "gptq",
        "awq",
        "awq-gptq",
        "awq-gptaq",
        "awq-yaqa",
        "smoothquant",
        "aqlm",
    }
    for name, solver in SOLVERS.items():
        assert solver.name == name
        for kind in solver.modules:
            assert callable(rounding_for(SCHEMES[kind], solver))


def test_an_unknown_name_suggests_and_lists() -> None:
    with pytest.raises(UsageError) as caught:
        find_solver("gtpq")
    assert caught.value.hint == f"Did you mean 'gptq'? the solvers are {', '.join(SOLVERS)}"
