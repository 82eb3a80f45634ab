"""CUDA kernels in tests: on a GPU where there is one, and on the processor through the emulation of a block."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

EMULATION = Path(__file__).parent / "emulation"
WRAPPERS = [
    f"aphroquant.kernels.cuda.{name}"
    for name in (
        "aqlm.dequantize",
        "aqlm.gather",
        "aqlm.lookup",
        "aqlm.sliced",
        "attention.decode",
        "attention.prefill",
        "attention.prefill_wgmma",
        "fused.embedding",
        "fused.gated_activation",
        "fused.rms_norm",
        "fused.rotary_cache",
        "float8.quantize",
        "float8.wgmma",
        "grouped.choosing",
        "grouped.inputs",
        "grouped.multiply",
        "grouped.routing",
        "integer.batch",
        "integer.decode",
        "integer.mma",
        "integer.wgmma",
        "sampling.tokens",
    )
]


class EmulatedTensorMap(ctypes.Structure):
    """What emulation/ptx/bulk_copy.cuh reads."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)

    @classmethod
    def of(cls, tensor: torch.Tensor, box: Sequence[int], *, swizzle: int = 0) -> EmulatedTensorMap:
        size = tensor.element_size()
        assert tensor.dim() in (2, 4) and tensor.stride(-1) == 1 and swizzle == 128
        if tensor.dim() == 4:
            strides = [stride * size for stride in tensor.stride()[:-1]]
            return cls((ctypes.c_uint64 * 16)(tensor.data_ptr(), *tensor.shape, *strides, *box, size))
        assert tensor.stride(0) * size % 16 == 0 and box[1] * size == 128
        words = (tensor.data_ptr(), *tensor.shape, tensor.stride(0) * size, *box, size)
        return cls((ctypes.c_uint64 * 16)(*words))


class EmulatedKernel:
    """A kernel's source compiled for the processor, launched on CPU tensors like the real one."""

    def __init__(self, directory: Path, include: Path, source: str, entry: str, macros: Mapping[str, Any]) -> None:
        key = hashlib.sha256(repr((source, entry, sorted(macros.items()))).encode()).hexdigest()[:16]
        library = directory / f"{entry}-{key}.so"
        if not library.exists():
            definitions = [f"-D{name}={int(value) if value is True else value or 0}" for name, value in macros.items()]
            subprocess.run(
                [*_compiler(directory, include), "-shared", *definitions, f'-DSOURCE="{source}"', f"-DENTRY={entry}",
                 str(directory / "main.cpp"), "-o", str(library)],
                check=True,
            )  # fmt: skip
        self._run = ctypes.CDLL(str(library)).run

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        cluster: object = None,
        programmatic: bool = False,
    ) -> None:
        values = [_as_parameter(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self._run(
            pointers, *(ctypes.c_uint(size) for size in grid), ctypes.c_uint(block[0]), ctypes.c_size_t(shared_bytes)
        )


def _compiler(directory: Path, include: Path) -> list[str]:
    return ["g++", "-std=c++17", "-O0", "-fPIC", "-w", f"-I{directory}", f"-I{include}"]


def _as_parameter(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        assert arg.is_contiguous()
        return ctypes.c_void_p(arg.data_ptr())
    return ctypes.c_void_p(None) if arg is None else arg


@pytest.fixture(scope="session")
def emulation_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with the emulated instructions in place of the real ones."""
    directory = tmp_path_factory.mktemp("emulation")
    source = Path(importlib.import_module("aphroquant.kernels.cuda").__file__).parent / "source"
    for path in (
        *source.glob("*.cu"),
        *source.glob("*.cuh"),
        *EMULATION.glob("*.*"),
    ):
        shutil.copy(path, directory)
    shutil.copytree(EMULATION / "ptx", directory / "ptx")
    include = _cuda_headers()
    if include is None or not shutil.which("g++"):
        pytest.skip("the emulation needs g++ and CUDA's headers")
    header = directory / "device.h"  # precompiled: the headers are most of each kernel's compile time
    subprocess.run([*_compiler(directory, include), "-x", "c++-header", str(header), "-o", f"{header}.gch"], check=True)
    return directory


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels of a test run."""
    if request.param == "cuda":
        from aphroquant.kernels.cuda.device import obstacle

        if reason := obstacle():
            pytest.skip(reason)
        return torch.device("cuda")
    request.getfixturevalue("emulated_kernels")
    return torch.device("cpu")


@pytest.fixture
def emulated_kernels(emulation_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run emulated, on CPU tensors."""
    include = _cuda_headers()
    assert include is not None

    def emulated(source: str, entry: str, macros: Mapping[str, Any] | None = None) -> EmulatedKernel:
        return EmulatedKernel(emulation_directory, include, source, entry, macros or {})

    for name in WRAPPERS:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "cuda_kernel", emulated)
        if hasattr(module, "TensorMap"):
            monkeypatch.setattr(module, "TensorMap", EmulatedTensorMap)


def _cuda_headers() -> Path | None:
    """cuda_bf16.h and its neighbours: of a toolkit, or of the wheels that torch brings."""
    roots = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    roots += [path / "nvidia" / "cu13" / "include" for path in map(Path, sys.path)]
    return next((root for root in roots if (root / "cuda_bf16.h").exists()), None)
