"""Finding a CUDA compiler: NVRTC in the wheels that torch's CUDA builds bring, or in a CUDA toolkit, else nvcc."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h")


class CompilerUnavailableError(Exception):
    """There is no usable compiler; the message says what was looked for."""


@dataclass(frozen=True)
class Nvrtc:
    """An NVRTC library with the headers that belong to it. `builtins` must be loaded before the library."""

    library: Path
    builtins: Path
    include: Path
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]} ({self.library})"


@dataclass(frozen=True)
class Nvcc:
    """The compiler driver of a toolkit that has no NVRTC. Slower, and it needs a C++ compiler beside it."""

    path: Path
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]} ({self.path})"


@cache
def toolchain() -> Nvrtc | Nvcc:
    """The compiler to use. Raises CompilerUnavailableError."""
    driver = driver_version()
    rejected: list[str] = []
    for found in _compilers():
        if isinstance(found, str):
            rejected.append(found)
        elif driver is not None and found.version[0] > driver[0]:
            rejected.append(f"{found} is newer than the driver, which runs CUDA {driver[0]}.{driver[1]}")
        else:
            return found
    nothing = "neither the packages nvidia-cuda-nvrtc and nvidia-cuda-runtime nor a CUDA toolkit is there"
    raise CompilerUnavailableError(f"no CUDA compiler found: {'; '.join(rejected) or nothing}")


@cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that the installed driver runs; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _compilers() -> Iterator[Nvrtc | Nvcc | str]:
    """Best first; a sentence in place of one that lacks something."""
    for library, include in _candidates():
        yield _complete(library, include)
    yield from _nvcc()


def _complete(library: Path, include: Path) -> Nvrtc | str:
    """NVRTC with all that it needs, or what it lacks."""
    if missing := [name for name in HEADERS if not (include / name).is_file()]:
        return f"{library} has no headers beside it ({include} lacks {', '.join(missing)})"
    found = sorted(library.parent.glob("libnvrtc-builtins.so.*"))
    versions = [re.fullmatch(r"libnvrtc-builtins\.so\.(\d+)\.(\d+)", path.name) for path in found]
    exact = [(path, match) for path, match in zip(found, versions, strict=True) if match]
    if not exact:
        return f"{library} has no libnvrtc-builtins beside it"
    builtins, match = exact[-1]
    return Nvrtc(library.resolve(), builtins, include, (int(match[1]), int(match[2])))


def _candidates() -> Iterator[tuple[Path, Path]]:
    """(library, header folder), best first."""
    for root in _wheel_roots():
        for bundle in sorted(root.glob("cu[0-9]*"), reverse=True):  # CUDA 13: one folder for all packages
            for library in _libraries(bundle / "lib"):
                yield library, bundle / "include"
        for library in _libraries(root / "cuda_nvrtc" / "lib"):  # CUDA 12: one folder a package
            yield library, root / "cuda_runtime" / "include"
    for toolkit in _toolkits():
        for folder in (toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib")):
            for library in _libraries(folder):
                yield library, toolkit / "include"


def _libraries(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("libnvrtc.so.*") if path.suffix[1:].isdigit()), reverse=True)[:1]


def _wheel_roots() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _toolkits() -> list[Path]:
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    found = [Path(nvcc).resolve().parent.parent] if nvcc else []
    return [*named, *found, Path("/usr/local/cuda")]


def _nvcc() -> Iterator[Nvcc | str]:
    """Those that say which version they are."""
    on_path = shutil.which("nvcc")
    paths = ([Path(on_path)] if on_path else []) + [root / "bin" / "nvcc" for root in _toolkits()]
    for path in dict.fromkeys(path for path in paths if path.is_file()):
        done = subprocess.run([str(path), "--version"], capture_output=True, text=True)
        match = re.search(r"release (\d+)\.(\d+)", done.stdout)
        yield Nvcc(path, (int(match[1]), int(match[2]))) if match else f"{path} does not say its version"
