"""Short checks of every kernel against a float64 reference, which `aphroquant doctor` runs.

A folder beside this file lists its own in a module `self_test.py`: a tuple SELF_TESTS, or a function `self_tests()`
that gives those which the GPU found has the features for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SelfTest:
    """`run` gives a relative error, ||out - reference|| / ||reference||, which must not exceed `tolerance`."""

    name: str
    run: Callable[[], float]
    tolerance: float


def all_self_tests() -> list[SelfTest]:
    """Of every folder that lists some."""
    found: list[SelfTest] = []
    for path in sorted(Path(__file__).parent.glob("*/self_test.py")):
        module = importlib.import_module(f"aphroquant.kernels.cuda.{path.parent.name}.self_test")
        found += module.self_tests() if hasattr(module, "self_tests") else module.SELF_TESTS
    return found
