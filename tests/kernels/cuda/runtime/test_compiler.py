"""Compiling CUDA sources without a GPU: errors that can be read, results that are kept and told apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda import compiler, sources
from aphroquant.kernels.cuda.compiler import KernelCompileError, compile_all, compile_kernel
from aphroquant.kernels.cuda.machine_code import entries
from aphroquant.kernels.cuda.toolchain import CompilerUnavailableError, Nvcc, _nvcc

SCALE = """
#include <cuda_fp16.h>
#include "parts/factor.cuh"
extern "C" __global__ void scale(float* x, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] *= factor() * MACRO;
}
"""


@pytest.fixture
def source_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvrtc: None) -> Path:
    """A folder of sources in place of the package's, with one kernel."""
    monkeypatch.setattr(sources, "SOURCE_ROOT", tmp_path)
    monkeypatch.setattr(compiler, "SOURCE_ROOT", tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "scale.cu").write_text(SCALE)
    (tmp_path / "parts" / "factor.cuh").write_text("__device__ float factor() { return 2.0f; }\n")
    sources.source_digest.cache_clear()
    return tmp_path


def test_a_kernel_becomes_machine_code_for_its_architecture(source_root: Path) -> None:
    compiled = compile_kernel("scale.cu", {"MACRO": 3}, "sm_90a")
    assert entries(compiled.cubin) == ["scale"]
    used = compiled.resources["scale"]
    assert 0 < used.registers < 32
    assert used.spills == used.stack == used.shared == 0


def test_a_compiled_kernel_comes_from_the_cache(source_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_kernel("scale.cu", {"MACRO": 4}, "sm_80")
    monkeypatch.setattr(compiler, "_run_nvrtc", None)
    monkeypatch.setattr(compiler, "_run_nvcc", None)
    assert compile_kernel("scale.cu", {"MACRO": 4}, "sm_80") == first


def test_macros_architecture_and_included_text_make_other_kernels(source_root: Path) -> None:
    def code(macro: int = 1, architecture: str = "sm_80") -> bytes:
        sources.source_digest.cache_clear()
        return compile_kernel("scale.cu", {"MACRO": macro}, architecture).cubin

    first = code()
    assert code() == first
    assert len({first, code(2), code(architecture="sm_89")}) == 3
    (source_root / "parts" / "factor.cuh").write_text("__device__ float factor() { return 5.0f; }\n")
    assert code() != first


def test_an_error_names_the_kernel_the_architecture_and_the_line(source_root: Path) -> None:
    (source_root / "broken.cu").write_text('extern "C" __global__ void broken(int* x) { x[0] = nothing; }\n')
    with pytest.raises(KernelCompileError) as caught:
        compile_kernel("broken.cu", {"BITS": 4, "WIDE": True}, "sm_90a")
    message = str(caught.value)
    assert "broken.cu(BITS=4, WIDE=1) for sm_90a does not compile" in message
    assert "broken.cu(1)" in message
    assert '"nothing" is undefined' in message


def test_many_kernels_are_compiled_at_a_time_and_an_error_stops_no_other(source_root: Path) -> None:
    (source_root / "broken.cu").write_text("#error no\n")
    jobs = [("scale.cu", {"MACRO": 7}, "sm_80"), ("broken.cu", {}, "sm_80"), ("scale.cu", {"MACRO": 8}, "sm_80")]
    good, bad, other = compile_all(jobs, 2)
    assert isinstance(bad, KernelCompileError)
    assert not isinstance(good, KernelCompileError)
    assert not isinstance(other, KernelCompileError)
    assert good.cubin != other.cubin


def test_a_compiler_that_crashes_is_an_error_and_not_the_end(
    source_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import os; os.abort()")
    monkeypatch.setattr(compiler, "_WORKER", worker)
    with pytest.raises(KernelCompileError, match="the compiler process ended with code -6"):
        compile_kernel("scale.cu", {"MACRO": 9}, "sm_80")


def test_nvcc_compiles_where_there_is_no_nvrtc(source_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = next((tools for tools in _nvcc() if isinstance(tools, Nvcc)), None)
    if found is None:
        pytest.skip("nvcc is not installed")
    monkeypatch.setattr(compiler, "toolchain", lambda: found)
    compiled = compile_kernel("scale.cu", {"MACRO": 10}, "sm_90a")
    assert entries(compiled.cubin) == ["scale"]
    assert compiled.resources["scale"].registers > 0
    (source_root / "broken.cu").write_text("#error no\n")
    with pytest.raises(KernelCompileError, match=r"broken.cu\(\) for sm_90a does not compile \(nvcc"):
        compile_kernel("broken.cu", {}, "sm_90a")


def test_an_unknown_source_lists_the_known_ones(source_root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no kernel source 'scall.cu' .* there are: scale.cu"):
        compile_kernel("scall.cu", {}, "sm_80")


def test_without_a_compiler_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise CompilerUnavailableError("no CUDA compiler found: nothing is installed")

    monkeypatch.setattr(compiler, "toolchain", nothing)
    with pytest.raises(UsageError, match="cannot be compiled: no CUDA") as caught:
        compile_kernel("launch_probe.cu", {}, "sm_80")
    assert "pip install nvidia-cuda-nvrtc" in str(caught.value.hint)


def test_the_command_shows_what_a_kernel_uses(nvrtc: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aphroquant.kernels.cuda.compiler", "launch_probe.cu", "--arch", "sm_80"]
    target = tmp_path / "probe.cubin"
    done = subprocess.run([*command, "--cubin", str(target)], capture_output=True, text=True, check=True)
    assert "launch_probe: " in done.stdout
    assert "0 bytes spilled" in done.stdout
    assert "launch_probe" in entries(target.read_bytes())
    failed = subprocess.run([*command, "-Dfloat=nonsense"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "does not compile" in failed.stderr
    assert "Traceback" not in failed.stderr
