"""What computed an output: everything outside the request and its inputs that can decide a byte, or a duration."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

# torch computes, transformers and tokenizers cut texts into tokens, jinja2 renders chat templates, numpy and
# safetensors read and write. `python` and the processor's instruction sets belong to it.
PACKAGES = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "jinja2", "regex")


def environment(device: str) -> dict[str, Any]:
    """Versions, processor, kernels and, where `device` is one, the GPU."""
    return {
        **versions(),
        "platform": platform.platform(),
        **_processor(),
        **_device(device),
    }


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide bytes; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    import torch

    from aphroquant.diagnosis import cpu

    details = cpu().details
    chosen = os.environ.get("APHROQUANT_CPU_ISA")
    sets = details["instruction_sets"]
    return {
        "processor": details["name"],
        "memory_bytes": details["memory_bytes"],
        "threads": torch.get_num_threads(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kernels_instruction_set": chosen or (sets[0] if sets else None),
    }


def _device(name: str) -> dict[str, Any]:
    from aphroquant.devices import torch_device

    device = torch_device(name)
    if device.type != "cuda":
        return {"device": "cpu", "gpu": None}
    from aphroquant.diagnosis import gpus

    found = list(gpus())[device.index or 0].details
    return {"device": "cuda", "gpu": {name: found[name] for name in ("name", "capability", "driver", "torch_cuda")}}
