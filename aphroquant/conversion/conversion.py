"""What every conversion has, whatever it writes: a request, a source, timed stages, notes, warnings and an outcome.

A conversion is one output. `together.py` takes any number of them through the same phases, in this order: `check`,
`writing` (its files are open), `write_alone` (what needs no calibration), `take` (each block, solved), `write_rest`,
`finish` (the output gets its name).
"""

from __future__ import annotations

import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from aphroquant.calibration.data import CalibrationData
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.hashes import FileRecord
from aphroquant.conversion.allocation.choosing import choose_widths
from aphroquant.conversion.blocks import SolvedBlock
from aphroquant.conversion.gguf_plan import GgufPlan
from aphroquant.conversion.job.choices import ChoiceKeeper
from aphroquant.conversion.plan import ConversionPlan
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.repack import RepackPlan
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.result import ConversionResult


class Conversion(ABC):
    """One output. Times its stages, and gathers what the report needs.

    `reason` is why the source's own numbers cannot stay, when that is known already: then they are quantized anew.
    `plan` is there as soon as the conversion is.
    `resolved` is the request with the bits of each layer in its rules, where they were to be chosen.
    Without `measures` (a dry run) widths that are to be chosen are guessed; `choices` keeps those that were measured.
    """

    plan: ConversionPlan | RepackPlan | GgufPlan

    def __init__(
        self,
        request: ConversionRequest,
        checkpoint: Checkpoint,
        progress: Progress,
        *,
        reason: str | None = None,
        measures: bool = True,
        choices: ChoiceKeeper | None = None,
    ) -> None:
        self.request = self.resolved = request
        self.checkpoint = checkpoint
        self.progress = progress
        self.reason = reason
        self.allocation: dict[str, Any] = {}
        self._measures, self._choices = measures, choices
        self.timings: dict[str, float] = {}
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.shares = False  # the numbers of its blocks with other outputs
        self.started = time.monotonic()
        with self.timed("plan"):
            self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Make the plan, and the writer of what it says."""

    def preview(self) -> ConversionResult:
        """What would be made."""
        return replace(self._result(done=False), dry_run=True, seconds=0.0, peak_memory_bytes=0)

    @abstractmethod
    def _result(self, *, done: bool) -> ConversionResult:
        """What was made, or is planned."""

    @property
    @abstractmethod
    def calibrates(self) -> bool:
        """Whether it needs calibration text."""

    @property
    def solved_plan(self) -> ConversionPlan | None:
        """What it wants to be solved on calibration text; None if only the source's activations are asked for."""
        return None

    @property
    @abstractmethod
    def place(self) -> Path:
        """The directory or file that it makes."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that it writes."""
        return self.plan.num_bytes

    @property
    def read_late(self) -> Sequence[str]:
        """Tensors of the source that it reads after all others."""
        return ()

    @abstractmethod
    def check(self) -> None:
        """Find what would fail late. InputError for it."""

    @abstractmethod
    def writing(self) -> AbstractContextManager[Any]:
        """The output while it is written; leaving it before `finish` leaves nothing behind."""

    @abstractmethod
    def write_alone(self) -> None:
        """Write what needs no calibration, if that is all of it."""

    def take(self, solved: SolvedBlock) -> None:
        """Write a block of `solved_plan`."""
        raise AssertionError("without a plan to be solved nothing is solved")

    def distilled(self, report: dict[str, Any], seconds: float) -> None:
        """Told of a model that was trained as a whole, before its blocks come."""
        raise AssertionError("without a plan to be solved nothing is trained")

    @abstractmethod
    def write_rest(self, statistics: Mapping[str, InputStatistics]) -> None:
        """Write what is left. `statistics`: of the source's own layers, by module, if anyone asked for them."""

    @abstractmethod
    def finish(self, data: CalibrationData | None, source_files: Mapping[str, FileRecord]) -> ConversionResult:
        """Give the output its name. `data` is None if it saw no calibration text."""

    def allocate(self) -> None:
        """Choose the bits of each layer, if the request leaves them to a budget."""
        if not self.request.is_allocated:
            return
        with self.timed("allocation"):
            found = choose_widths(
                self.checkpoint, self.request, self.progress, measures=self._measures, keeper=self._choices
            )
        self.resolved, self.allocation = found
        bits, widths = self.allocation["bits_per_weight"], self.allocation["widths"]
        told = ", ".join(f"{count} layers {label}" for label, count in widths.items())
        self.note(f"{'guessed' if not self._measures else 'chosen'} bits: {bits:.3f} on average; {told}")

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
            "allocation": self.allocation,
            "seconds": time.monotonic() - self.started,
            "peak_memory_bytes": peak_memory(),
            "warnings": tuple(self.warnings),
            "notes": tuple(self.notes),
        }


def peak_memory() -> int:
    """Greatest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
