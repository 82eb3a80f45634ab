"""CUDA sources to machine code: a compiler in a process of its own, results kept on disk.

A kernel is compiled for one exact architecture with its shape constants as macros, so there is nothing to choose at run
time and no PTX for the driver to compile. Without a GPU, this shows what a kernel uses:

    python -m aphroquant.kernels.cuda.compiler FILE.cu -DNAME=VALUE --arch sm_90a
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from aphroquant.errors import AphroquantError, UsageError
from aphroquant.kernels.cuda.cache import Entry, cached
from aphroquant.kernels.cuda.resources import Resources, parse_resources
from aphroquant.kernels.cuda.sources import SOURCE_ROOT, source_digest, source_path
from aphroquant.kernels.cuda.toolchain import CompilerUnavailableError, Nvcc, Nvrtc, driver_version, toolchain
from aphroquant.kernels.cuda.variants import Macro

_WORKER = Path(__file__).parent / "nvrtc_worker.py"
_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
Tools = Nvrtc | Nvcc
_TIMEOUT = 600.0  # seconds; the largest kernel takes a few


class KernelCompileError(AphroquantError):
    """A kernel's source does not compile. The message holds the compiler's log."""


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code for one architecture."""

    name: str
    architecture: str
    cubin: bytes
    log: str

    @property
    def resources(self) -> dict[str, Resources]:
        """What each entry function uses."""
        return parse_resources(self.log)


def compile_kernel(source: str, macros: Mapping[str, Macro], architecture: str) -> CompiledKernel:
    """`source` (relative to source/) for `architecture` ("sm_90a"), from the cache if it is there.

    Raises KernelCompileError, or UsageError if there is no compiler.
    """
    tools = _toolchain()
    definitions = _definitions(macros)
    name = f"{source}({', '.join(option[2:] for option in definitions)})"
    options = [*_OPTIONS, *definitions]

    def make() -> Entry:
        description = f"{name} for {architecture}"
        if isinstance(tools, Nvcc):
            return _run_nvcc(tools, source, options, architecture, description)
        return _run_nvrtc(tools, source, options, architecture, description)

    entry = cached(_key(tools, source, options, architecture), make)
    return CompiledKernel(name, architecture, entry.cubin, entry.log)


def compile_all(
    jobs: Iterable[tuple[str, Mapping[str, Macro], str]], num_workers: int
) -> list[CompiledKernel | KernelCompileError]:
    """Many `compile_kernel` calls at a time; results in order. An error stands in its kernel's place."""

    def one(job: tuple[str, Mapping[str, Macro], str]) -> CompiledKernel | KernelCompileError:
        try:
            return compile_kernel(*job)
        except KernelCompileError as error:
            return error

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(one, jobs))


def _toolchain() -> Tools:
    try:
        return toolchain()
    except CompilerUnavailableError as error:
        raise UsageError(
            f"CUDA kernels cannot be compiled: {error}",
            hint="pip install nvidia-cuda-nvrtc nvidia-cuda-runtime (of the driver's CUDA version), or set CUDA_HOME",
        ) from error


def _definitions(macros: Mapping[str, Macro]) -> list[str]:
    """As compiler options; True and False as 1 and 0."""
    return [f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in sorted(macros.items())]


def _key(tools: Tools, source: str, options: list[str], architecture: str) -> str:
    """Of everything that decides the machine code, and of the driver that runs it."""
    compiler = f"{type(tools).__name__} {tools.version}"
    parts = [source_digest(source), *options, architecture, compiler, str(driver_version())]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{Path(source).stem}-{digest[:40]}"


def _run_nvrtc(tools: Nvrtc, source: str, options: list[str], architecture: str, description: str) -> Entry:
    path = source_path(source)
    with tempfile.TemporaryDirectory(prefix="aphroquant-") as folder:
        output = Path(folder) / "kernel.cubin"
        job: dict[str, object] = {
            "library": str(tools.library),
            "preload": [str(tools.builtins)],
            "name": str(path),
            "source": path.read_text(encoding="utf-8"),
            "options": [
                *options,
                f"--gpu-architecture={architecture}",
                f"--include-path={SOURCE_ROOT}",
                f"--include-path={tools.include}",
            ],
            "output": str(output),
        }
        answer = _answer(job, description)
        if answer["error"] is not None:
            raise KernelCompileError(f"{description} does not compile ({answer['error']}):\n{answer['log']}")
        return Entry(output.read_bytes(), str(answer["log"]), description)


def _run_nvcc(tools: Nvcc, source: str, options: list[str], architecture: str, description: str) -> Entry:
    number = architecture.removeprefix("sm_")
    with tempfile.TemporaryDirectory(prefix="aphroquant-") as folder:
        output = Path(folder) / "kernel.cubin"
        target = f"-gencode=arch=compute_{number},code=sm_{number}"
        command = [str(tools.path), "--cubin", target, *options, f"-I{SOURCE_ROOT}", str(source_path(source))]
        try:
            done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, timeout=_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise KernelCompileError(f"{description}: the compiler did not end within {_TIMEOUT:.0f} s") from error
        if done.returncode != 0:
            raise KernelCompileError(f"{description} does not compile ({tools}):\n{done.stderr or done.stdout}")
        return Entry(output.read_bytes(), done.stderr, description)


def _answer(job: dict[str, object], description: str) -> dict[str, str | None]:
    """What the worker process says; it may crash, hang, or not start."""
    command = [sys.executable, "-I", "-S", str(_WORKER)]
    try:
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise KernelCompileError(f"{description}: the compiler did not end within {_TIMEOUT:.0f} s") from error
    if done.returncode != 0:
        said = done.stderr.strip() or "it said nothing"
        raise KernelCompileError(f"{description}: the compiler process ended with code {done.returncode}:\n{said}")
    answer: dict[str, str | None] = json.loads(done.stdout)
    return answer


def _main() -> None:
    import argparse
    import time

    parser = argparse.ArgumentParser(description="Compile a kernel source and show what it uses.")
    parser.add_argument("source")
    parser.add_argument("-D", dest="macros", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--cubin", type=Path, help="write the machine code here")
    arguments = parser.parse_args()
    macros = dict(macro.partition("=")[::2] for macro in arguments.macros)
    start = time.perf_counter()
    kernel = compile_kernel(arguments.source, macros, arguments.arch)
    print(f"{kernel.name} for {kernel.architecture}: {time.perf_counter() - start:.2f} s, {len(kernel.cubin)} bytes")
    for used in kernel.resources.values():
        print(
            f"  {used.entry}: {used.registers} registers, {used.spills} bytes spilled, {used.stack} bytes stack, "
            f"{used.shared} bytes shared"
        )
    print("\n".join(line for line in kernel.log.splitlines() if "warning" in line))
    if arguments.cubin:
        arguments.cubin.write_bytes(kernel.cubin)


if __name__ == "__main__":
    try:
        _main()
    except AphroquantError as failure:
        sys.exit(f"error: {failure}" + (f"\nhint: {failure.hint}" if failure.hint else ""))
