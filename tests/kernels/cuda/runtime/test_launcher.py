"""Launching: how arguments are laid out, what reaches the driver, and on a GPU what the kernels saw."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from ctypes import c_bool, c_double, c_float, c_int8, c_int16, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.launcher import TensorMap, cuda_kernel, sign
from aphroquant.kernels.cuda.native_launcher import native_library
from aphroquant.kernels.cuda.probe import launches
from aphroquant.kernels.cuda.probe.self_test import self_tests

HEADER = 80
STUB = Path(__file__).parent / "stub"


def _layout(*args: object) -> list[tuple[int, int]]:
    signature = sign(args)  # type: ignore[arg-type]
    return [(offset - HEADER, size) for offset, size in zip(signature.offsets, signature.sizes, strict=True)]


def test_parameters_lie_as_a_c_compiler_lays_them() -> None:
    x = torch.zeros(1)
    assert _layout(x, c_int32(1), x, c_int8(1), c_int16(1), c_float(1), c_double(1), c_bool(True), c_int64(1)) == [
        (0, 8),
        (8, 4),
        (16, 8),
        (24, 1),
        (26, 2),
        (28, 4),
        (32, 8),
        (40, 1),
        (48, 8),
    ]


def test_a_tensor_map_stands_at_a_multiple_of_64() -> None:
    assert _layout(c_int32(1), TensorMap(), c_int8(1), TensorMap()) == [(0, 4), (64, 128), (192, 1), (256, 128)]


def test_arguments_are_packed_by_value() -> None:
    x = torch.zeros(1)
    args = [x, c_int32(-5), None, c_float(1.5), c_void_p(77), c_void_p(None), c_int64(-1)]
    signature = sign(args)  # type: ignore[arg-type]
    values = [convert(arg) for convert, arg in zip(signature.convert, args, strict=True)]
    assert values == [x.data_ptr(), -5, 0, 1.5, 77, 0, -1]
    assert len(signature.record.pack(*[0] * 16, *values)) == signature.offsets[6] + 8


@pytest.mark.parametrize("bad", [3, 1.5, b"bytes", "text", [1]])
def test_an_argument_whose_width_is_unknown_is_refused(bad: object) -> None:
    with pytest.raises(TypeError, match="a kernel takes tensors, None, ctypes scalars and structures, not"):
        sign([bad])  # type: ignore[list-item]


@pytest.fixture(scope="session")
def stub_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that says what it is asked to launch."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build a stub driver with")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(STUB / "driver.cpp")], check=True)
    return folder


@pytest.mark.parametrize("kind", ["native", "ctypes"])
def test_what_is_asked_for_reaches_the_driver(stub_driver: Path, kind: str) -> None:
    if kind == "native" and native_library() is None:
        pytest.skip("the compiled launcher was not built")

    def run(handle: str) -> list[str]:
        command = [sys.executable, str(STUB / "launch.py"), kind, handle]
        done = subprocess.run(command, env={"LD_LIBRARY_PATH": str(stub_driver)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    where, first, second, refused = run("0xf")
    start = "function 0xf context 0xc0 stream 0x57aea grid 1 2 3 block 4 5 6 shared 7 attribute 4: 1 2 1 "
    end = f"parameters {where.removeprefix('x is at ')} (nil) {{7 2.5 -0.25}} -3"
    assert first == f"{start}attribute 6: 1 0 0 {end}"
    assert second == f"function 0xf context 0xc0 stream 0x57aea grid 9 1 1 block 32 1 1 shared 0 {end}"
    assert "launch_probe(BITS=4) takes parameters of [8, 8, 16, 1] bytes, but got [8, 8, 16, 1, 8]" in refused
    failed = run("0xbad")[-1]
    assert "launching launch_probe(BITS=4) with grid (1, 2, 3)" in failed
    assert "CUDA error 700 (CUDA_ERROR_ILLEGAL_ADDRESS" in failed
    assert "CUDA_LAUNCH_BLOCKING=1" in failed


def test_without_a_gpu_the_reason_is_told() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=r"CUDA kernels cannot run: torch .* (without CUDA|finds no GPU)") as caught:
        cuda_kernel("launch_probe.cu", "launch_probe")
    assert "aphroquant doctor" in str(caught.value.hint)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "run", [launches.arguments_and_shared_memory, launches.dependent_launches, launches.graph_replay]
)
def test_kernels_see_their_arguments(cuda: None, run: Callable[[], float]) -> None:
    assert run() < 1e-6


@pytest.mark.gpu
def test_every_probe_of_this_gpu_passes(cuda: None) -> None:
    for test in self_tests():
        assert test.run() <= test.tolerance, test.name


@pytest.mark.gpu
def test_kernels_run_on_every_device(cuda: None) -> None:
    for device in range(torch.cuda.device_count()):
        assert launches.arguments_and_shared_memory(device) < 1e-6


@pytest.mark.gpu
def test_a_tensor_on_the_cpu_is_refused(cuda: None) -> None:
    kernel = cuda_kernel(launches.SOURCE, "empty_probe")
    with pytest.raises(UsageError, match="is on the CPU, but the kernel runs on a GPU"):
        kernel.launch((1, 1, 1), (32, 1, 1), [torch.zeros(1)] * 4 + [c_int32(1), c_int32(1)])  # type: ignore[list-item]
