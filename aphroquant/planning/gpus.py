"""GPUs by name: memory as nvidia-smi or rocm-smi tells it, and bandwidth as the maker's data sheet does."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from aphroquant.errors import UsageError


class Gpu(NamedTuple):
    """Memory in MiB, bandwidth in GB/s (1e9)."""

    name: str
    memory_mib: int
    bandwidth: float

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * 2**20


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4-16g", 15360, 320),
        Gpu("v100-32g", 32768, 900),
        Gpu("a10g-24g", 23028, 600),
        Gpu("l4-24g", 23034, 300),
        Gpu("l40s-48g", 46068, 864),
        Gpu("a6000-48g", 49140, 768),
        Gpu("rtx3090-24g", 24576, 936),
        Gpu("rtx4090-24g", 24564, 1008),
        Gpu("rtx5090-32g", 32607, 1792),
        Gpu("a100-40g", 40960, 1555),
        Gpu("a100-80g", 81920, 2039),
        Gpu("h100-80g", 81559, 3350),
        Gpu("h100-pcie-80g", 81559, 2000),
        Gpu("h100-nvl-94g", 95830, 3900),
        Gpu("h200-141g", 143771, 4800),
        Gpu("b200-180g", 183359, 8000),
        Gpu("mi300x-192g", 196592, 5300),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name. UsageError listing the known ones."""
    found = GPUS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1)
        known = f"known are {', '.join(GPUS)}"
        raise UsageError(f"unknown GPU {name!r}", hint=f"Did you mean {near[0]!r}? {known}" if near else known)
    return found
