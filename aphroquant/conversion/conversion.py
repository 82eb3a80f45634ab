"""What every conversion has, whatever it writes: a request, a source, timed stages, notes, warnings and an outcome."""

from __future__ import annotations

import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.result import ConversionResult


class Conversion(ABC):
    """One run. Times its stages, and gathers what the report needs.

    `reason` is why the source's own numbers cannot stay, when that is known already: then they are quantized anew.
    """

    def __init__(
        self, request: ConversionRequest, checkpoint: Checkpoint, progress: Progress, *, reason: str | None = None
    ) -> None:
        self.request = request
        self.checkpoint = checkpoint
        self.progress = progress
        self.reason = reason
        self.timings: dict[str, float] = {}
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.started = time.monotonic()

    @abstractmethod
    def preview(self) -> ConversionResult:
        """What `run` would make."""

    @abstractmethod
    def run(self) -> ConversionResult:
        """Make it."""

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.progress.note(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.progress.warn(text)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.timings[stage] = time.monotonic() - begun

    def measured(self) -> dict[str, Any]:
        """Fields of the result that every kind of conversion fills in alike."""
        return {
            "source": self.request.source,
            "out": str(self.request.out),
            "to": self.request.to,
            "source_bytes": self.checkpoint.num_bytes,
            "seconds": time.monotonic() - self.started,
            "peak_memory_bytes": peak_memory(),
            "warnings": tuple(self.warnings),
            "notes": tuple(self.notes),
        }


def peak_memory() -> int:
    """Greatest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
