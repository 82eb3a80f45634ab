"""What a walk keeps while it goes on, where, and whether there is room for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.disk import size_text
from aphroquant.conversion.conversion import Conversion
from aphroquant.conversion.job.blocks import BlockKeeper
from aphroquant.conversion.job.directory import JobDirectory, default_job
from aphroquant.conversion.job.fingerprint import Fingerprint
from aphroquant.conversion.job.steps import KeptSteps, StepKeeper
from aphroquant.conversion.passed import PassedBlock
from aphroquant.conversion.progress import Progress
from aphroquant.errors import ResourceError

if TYPE_CHECKING:
    from aphroquant.conversion.walk import Walk

Place = Path | Literal[False] | None  # None: beside the first output; False: nowhere


class Job:
    """Keeps nothing: a conversion that cannot go on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return

    def decide(self, name: str, value: Any) -> Any:
        """What was decided when the job began, so that it stays so: `value` if it begins now. JSON holds it."""
        return value

    def passes(self, walk: Walk) -> Iterator[PassedBlock]:
        """All blocks of the walk, in order."""
        return walk.passes()

    def steps(self, branch: int) -> StepKeeper:
        """What keeps the steps of distilling a branch."""
        return StepKeeper()

    def finish(self) -> None:
        """The outputs are whole: nothing is needed any more."""


class KeptJob(Job):
    """Keeps everything in a directory, until `finish`; if it is left before, the directory stays for the next run."""

    def __init__(self, directory: JobDirectory, num_blocks: int, progress: Progress) -> None:
        self._directory, self._progress = directory, progress
        self._blocks = BlockKeeper(directory, num_blocks, progress.note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._blocks.close()
        if self._directory.release():
            self._progress.note(f"the work so far is kept in {self._directory.path}: the same command goes on from it")

    def decide(self, name: str, value: Any) -> Any:
        return self._directory.decide(name, value)

    def passes(self, walk: Walk) -> Iterator[PassedBlock]:
        return self._blocks.passes(walk)

    def steps(self, branch: int) -> StepKeeper:
        return KeptSteps(self._directory, f"steps{branch}", self._progress.note)

    def finish(self) -> None:
        self._blocks.close()
        self._directory.finish()


def open_job(
    place: Place,
    told: Fingerprint,
    conversions: Sequence[Conversion],
    checkpoint: Checkpoint,
    progress: Progress,
    *,
    num_bytes: int,
) -> Job:
    """The job of conversions that share a walk, with the fingerprint `told`; it takes about `num_bytes`. ResourceError
    if the user named a place that has no room for it."""
    if place is False:
        return Job()
    path = default_job(conversions[0].place) if place is None else place.expanduser()
    lacking = _lacking_room(path, num_bytes, conversions)
    if lacking is not None:
        if place is not None:
            raise ResourceError(f"--job {path}: {lacking}", hint="free some space or give another --job")
        progress.note(f"no job is kept, so that a killed conversion begins anew: {lacking}")
        return Job()
    directory = JobDirectory(path, told, named=place is not None)
    if directory.began_anew:
        progress.note(f"begun anew, and not from {directory.path}, of another conversion: {directory.began_anew}")
    return KeptJob(directory, checkpoint.spec.num_layers, progress)


def _lacking_room(path: Path, num_bytes: int, conversions: Sequence[Conversion]) -> str | None:
    """In words, if job and outputs do not fit on the disk."""
    needed, place = num_bytes - _size(path), _existing(path)
    for conversion in conversions:
        if place.stat().st_dev == _existing(conversion.place).stat().st_dev:
            needed += conversion.num_bytes
    free = shutil.disk_usage(place).free
    if needed <= free:
        return None
    return f"it and the output need {size_text(needed)}, but the disk has {size_text(free)} free"


def _existing(path: Path) -> Path:
    place = path.expanduser().resolve()
    while not place.exists():
        place = place.parent
    return place


def _size(path: Path) -> int:
    """Bytes of the files of a job that is there already."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if path.is_dir() else 0
