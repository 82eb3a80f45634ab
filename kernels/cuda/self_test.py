"""The self-tests of the CUDA kernels.

A folder beside this file lists its own in a module `self_test.py`: a tuple SELF_TESTS, or a function `self_tests()`
that gives those which the GPU found has the features for.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from aphroquant.kernels.cuda.backend_self_test import layer_self_tests
from aphroquant.kernels.self_test import SelfTest

__all__ = ["SelfTest", "all_self_tests"]


def all_self_tests() -> list[SelfTest]:
    """Of every folder that lists some, then the layers that are made of them."""
    found: list[SelfTest] = []
    for path in sorted(Path(__file__).parent.glob("*/self_test.py")):
        module = importlib.import_module(f"aphroquant.kernels.cuda.{path.parent.name}.self_test")
        found += module.self_tests() if hasattr(module, "self_tests") else module.SELF_TESTS
    return [*found, *layer_self_tests()]
