"""Finding NVRTC: in the wheels or in a toolkit, complete, and not newer than the driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aphroquant.kernels.cuda import toolchain as module
from aphroquant.kernels.cuda.toolchain import HEADERS, CompilerUnavailableError, Nvcc, Nvrtc, toolchain


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_wheel_roots", list)
    monkeypatch.setattr(module, "_toolkits", list)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "driver_version", lambda: None)
    toolchain.cache_clear()
    yield
    toolchain.cache_clear()


def _install(library_folder: Path, include: Path, version: str) -> Path:
    library_folder.mkdir(parents=True, exist_ok=True)
    include.mkdir(parents=True, exist_ok=True)
    library = library_folder / f"libnvrtc.so.{version.split('.')[0]}"
    library.touch()
    (library_folder / f"libnvrtc.alt.so.{version.split('.')[0]}").touch()
    (library_folder / f"libnvrtc-builtins.so.{version}").touch()
    for name in HEADERS:
        (include / name).touch()
    return library


def _library() -> Path:
    found = toolchain()
    assert isinstance(found, Nvrtc)
    return found.library


def test_cuda_13_wheels_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = _install(tmp_path / "cu13" / "lib", tmp_path / "cu13" / "include", "13.0")
    monkeypatch.setattr(module, "_wheel_roots", lambda: [tmp_path])
    assert (_library(), toolchain().version) == (library, (13, 0))


def test_cuda_12_wheels_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = _install(tmp_path / "cuda_nvrtc" / "lib", tmp_path / "cuda_runtime" / "include", "12.8")
    monkeypatch.setattr(module, "_wheel_roots", lambda: [tmp_path])
    assert (_library(), toolchain().version) == (library, (12, 8))


def test_a_toolkit_is_the_second_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = _install(tmp_path / "lib64", tmp_path / "include", "13.1")
    monkeypatch.setattr(module, "_toolkits", lambda: [tmp_path])
    assert _library() == library


def test_a_library_newer_than_the_driver_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path / "cu13" / "lib", tmp_path / "cu13" / "include", "13.0")
    old = _install(tmp_path / "cuda_nvrtc" / "lib", tmp_path / "cuda_runtime" / "include", "12.8")
    monkeypatch.setattr(module, "_wheel_roots", lambda: [tmp_path])
    monkeypatch.setattr(module, "driver_version", lambda: (12, 9))
    assert _library() == old


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompilerUnavailableError, match="neither the packages nvidia-cuda-nvrtc"):
        toolchain()
    _install(tmp_path / "cu13" / "lib", tmp_path / "cu13" / "include", "13.0")
    (tmp_path / "cu13" / "include" / "cuda_bf16.h").unlink()
    monkeypatch.setattr(module, "_wheel_roots", lambda: [tmp_path])
    with pytest.raises(CompilerUnavailableError, match=r"has no headers beside it .* lacks cuda_bf16\.h"):
        toolchain()
    (tmp_path / "cu13" / "include" / "cuda_bf16.h").touch()
    (tmp_path / "cu13" / "lib" / "libnvrtc-builtins.so.13.0").unlink()
    with pytest.raises(CompilerUnavailableError, match="no libnvrtc-builtins beside it"):
        toolchain()


def test_nvcc_is_the_last_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.80'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(module, "_toolkits", lambda: [tmp_path])
    assert toolchain() == Nvcc(nvcc, (13, 1))
    library = _install(tmp_path / "lib64", tmp_path / "include", "13.1")
    toolchain.cache_clear()
    assert _library() == library
