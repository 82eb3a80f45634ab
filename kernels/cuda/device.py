"""Whether CUDA kernels can run here, on what, and if not, why and what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache

import torch

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.toolchain import CompilerUnavailableError, toolchain

MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int
    l2_bytes: int

    @property
    def architecture(self) -> str:
        return _architecture(self.capability)

    @property
    def obstacle(self) -> str | None:
        """Why it cannot run the kernels, or None."""
        if self.capability >= MIN_CAPABILITY:
            return None
        return (
            f"{self.name} has compute capability {_dotted(self.capability)}; the CUDA kernels need "
            f"{_dotted(MIN_CAPABILITY)} (Ampere) or newer"
        )

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"architecture": self.architecture, "obstacle": self.obstacle}


@cache
def obstacle() -> str | None:
    """Why CUDA kernels cannot run on the current device, or None."""
    if reason := no_gpu():
        return reason
    if reason := gpu(torch.cuda.current_device()).obstacle:
        return reason
    try:
        toolchain()
    except CompilerUnavailableError as error:
        return str(error)
    return None


def no_gpu() -> str | None:
    """Why torch sees no GPU, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU that it can use (no driver, no device, or a driver too old)"
    return None


def require() -> None:
    """UsageError unless CUDA kernels can run here."""
    if reason := obstacle():
        raise UsageError(f"CUDA kernels cannot run: {reason}", hint="`aphroquant doctor` shows what is usable")


@cache
def gpu(index: int) -> Gpu:
    """The GPU of that index."""
    found = torch.cuda.get_device_properties(index)
    return Gpu(
        index=index,
        name=found.name,
        capability=(found.major, found.minor),
        memory_bytes=found.total_memory,
        multiprocessors=found.multi_processor_count,
        l2_bytes=found.L2_cache_size,
    )


def architecture(index: int | None = None) -> str:
    """What to compile for: "sm_90a" on Hopper, whose own instructions need the a."""
    return gpu(torch.cuda.current_device() if index is None else index).architecture


def _architecture(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}" + ("a" if capability[0] == 9 else "")


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
