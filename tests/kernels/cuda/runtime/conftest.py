"""Fixtures of compiling and launching: a compiler, a GPU, and a cache folder that is not the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aphroquant.kernels.cuda import device
from aphroquant.kernels.cuda.toolchain import CompilerUnavailableError, toolchain


@pytest.fixture(autouse=True, scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where kernels of this run are kept."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APHROQUANT_CACHE", str(folder))
        yield folder / "kernels"


@pytest.fixture(scope="session")
def nvrtc() -> None:
    """Skips where CUDA sources cannot be compiled."""
    try:
        toolchain()
    except CompilerUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cuda() -> None:
    """Skips where CUDA kernels cannot run."""
    if reason := device.obstacle():
        pytest.skip(reason)
