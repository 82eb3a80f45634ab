"""What of aphroquant is usable on this machine, why not, and what to do: the findings behind `aphroquant doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("aphroquant", "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `usable` None: nothing that could be used or not. `hint` says what to do."""

    subject: str
    usable: bool | None
    text: str
    details: dict[str, Any]
    hint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"usable": self.usable, "text": self.text, "hint": self.hint} | self.details


def findings() -> Iterator[Finding]:
    """Everything that needs no kernel to run."""
    yield versions()
    yield cpu()
    yield from gpus()
    yield compiler()
    yield launcher()
    yield cache()


def versions() -> Finding:
    """Of this package and of those that it depends on."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # only what is there is told
    text = ", ".join(f"{name} {version}" for name, version in installed.items())
    return Finding("versions", None, text, {"versions": installed})


def cpu() -> Finding:
    """The processor, and whether the compiled library runs on it."""
    from aphroquant.kernels.cpu.library import instruction_sets, obstacle

    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = _cpu_name()
    details = {"name": name, "cores": cores, "memory_bytes": memory, "instruction_sets": []}
    where = f"{name}, {cores} cores, {memory / 2**30:.0f} GiB"
    if reason := obstacle():
        hint = "install a C++ compiler with OpenMP (Debian: apt install g++) and reinstall aphroquant"
        return Finding("cpu kernels", False, f"{where}; the slow reference kernels run: {reason}", details, hint)
    sets = instruction_sets()
    others = f" (also {', '.join(sets[1:])})" if sets[1:] else ""
    text = f"{where}; compiled library with {sets[0]}{others}"
    return Finding("cpu kernels", True, text, details | {"instruction_sets": sets})


def gpus() -> Iterator[Finding]:
    """One finding a GPU, or why there is none."""
    from aphroquant.kernels.cuda.device import gpu, no_gpu
    from aphroquant.kernels.cuda.toolchain import driver_version

    driver = driver_version()
    details: dict[str, Any] = {"driver": _driver_name(), "driver_cuda": driver, "torch_cuda": torch.version.cuda}
    if reason := no_gpu():
        yield Finding("gpu", False, f"none: {reason}", details, _gpu_hint(driver))
        return
    for index in range(torch.cuda.device_count()):
        found = gpu(index)
        text = (
            f"{index}: {found.name}, compute capability {found.capability[0]}.{found.capability[1]} "
            f"({found.architecture}), {found.memory_bytes / 2**30:.0f} GiB, driver {_driver_name() or 'unknown'}"
        )
        problem = found.obstacle
        hint = "run on the CPU with --backend cpu" if problem else None
        text = f"{text}; {problem}" if problem else text
        yield Finding("gpu", problem is None, text, details | found.to_dict(), hint)


def compiler() -> Finding:
    """What compiles the CUDA kernels on this machine."""
    from aphroquant.kernels.cuda.toolchain import CompilerUnavailableError, toolchain

    try:
        found = toolchain()
    except CompilerUnavailableError as error:
        hint = "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime (of the driver's CUDA version), or set CUDA_HOME"
        return Finding("cuda compiler", False, str(error), {}, hint)
    return Finding("cuda compiler", True, str(found), {"version": list(found.version)})


def launcher() -> Finding:
    """What starts CUDA kernels."""
    from aphroquant.kernels.cuda.native_launcher import native_library

    if native_library() is None:
        text = "ctypes: each launch outside a CUDA graph costs several microseconds more"
        hint = "install a C++ compiler and reinstall aphroquant"
        return Finding("cuda launcher", True, text, {"native": False}, hint)
    return Finding("cuda launcher", True, "compiled library", {"native": True})


def cache() -> Finding:
    """Compiled CUDA kernels on disk."""
    from aphroquant.kernels.cuda.cache import cache_state

    state = cache_state()
    text = f"{state.folder}: {state.num_kernels} kernels, {state.num_bytes / 1e6:.1f} MB"
    hint = None
    if state.num_damaged:
        text += f", {state.num_damaged} damaged (they are compiled again when they are needed)"
    if not state.writable:
        text += ", not writable: every process compiles its kernels again"
        hint = "set APHROQUANT_CACHE to a folder that can be written"
    return Finding("kernel cache", state.writable, text, state.to_dict(), hint)


def _gpu_hint(driver: tuple[int, int] | None) -> str | None:
    if torch.version.cuda is None and driver is not None:
        return "there is a CUDA driver: install torch with CUDA (https://pytorch.org) to use the GPU"
    if torch.version.cuda is not None and driver is None:
        return "install the NVIDIA driver; in a container, start it with --gpus all"
    if torch.version.cuda is not None and driver is not None and driver < _version(torch.version.cuda):
        return (
            f"the driver runs CUDA {driver[0]}.{driver[1]}, torch was built for {torch.version.cuda}: update the driver"
        )
    return None


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver_name() -> str | None:
    """The version of the NVIDIA driver."""
    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.is_file() else None
