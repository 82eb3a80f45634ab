"""Fixtures for the compiled kernels: every instruction set, and calls below the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from aphroquant.kernels.cpu import library
from aphroquant.kernels.cpu.attention import CacheKernels


@pytest.fixture(params=["avx512", "avx2_vnni", "avx2", "baseline"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once for each instruction set of this processor."""
    if reason := library.obstacle():
        pytest.skip(reason)
    name: str = request.param
    available = library.instruction_sets()
    if name not in available:
        pytest.skip(f"this processor has no {name}")
    library.select_instruction_set(name)
    yield name
    library.select_instruction_set(available[0])


@pytest.fixture
def compiled() -> None:
    """The test needs the compiled library."""
    if reason := library.obstacle():
        pytest.skip(reason)


@pytest.fixture
def cache_kernels(compiled: None) -> Callable[..., CacheKernels]:
    """`cache_kernels(cache, sliding_window=, num_threads=)`."""
    return CacheKernels
