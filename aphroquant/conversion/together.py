"""Any number of outputs of one source from one reading of the calibration text and one walk over its blocks.

No output gets its name before all of them are written: an error leaves none behind.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from aphroquant.calibration.data import CalibrationData, calibration_windows
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.base import naming
from aphroquant.checkpoint.followed import SourceHashes
from aphroquant.conversion.conversion import Conversion
from aphroquant.conversion.job.directory import default_job, remove_abandoned
from aphroquant.conversion.job.fingerprint import fingerprint
from aphroquant.conversion.job.job import Job, Place, open_job
from aphroquant.conversion.loss import LossError
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.result import ConversionResult
from aphroquant.conversion.team.cluster import is_cluster
from aphroquant.conversion.team.hiring import hired, num_workers, threads_of_each
from aphroquant.conversion.walk import Branch, Walk, branches, kept_bytes
from aphroquant.devices import torch_device
from aphroquant.errors import UsageError


class LossOfOneError(LossError):
    """A `LossError` that came up while an output was written, with its place among all of them."""

    def __init__(self, error: LossError, index: int) -> None:
        super().__init__(error.message, hint=error.hint)
        self.index = index


def run_together(
    conversions: Sequence[Conversion],
    checkpoint: Checkpoint,
    progress: Progress,
    place: Place = None,
    *,
    workers: int | str = 1,
) -> list[ConversionResult]:
    """Write all of them; results in their order. `place` is that of the job.

    A cluster that `workers` names is one that this process is connected to.
    """
    for conversion in conversions:
        conversion.check()
    calibrating = [conversion for conversion in conversions if conversion.calibrates]
    data = _read(calibrating, checkpoint, progress) if calibrating else None
    found = branches([(plan, each) for each in calibrating if (plan := each.solved_plan) is not None])
    late = checkpoint.places(conversions[0].read_late)
    with SourceHashes(checkpoint.files(), late) as sources, ExitStack() as outputs:
        job = outputs.enter_context(_job(place, calibrating, found, checkpoint, data, progress, workers))
        for conversion in conversions:
            outputs.enter_context(conversion.writing())
        for index, conversion in enumerate(conversions):
            if not conversion.calibrates:
                _write_alone(conversion, index)
        statistics = _walked(calibrating, found, checkpoint, data, job, progress, workers) if data is not None else {}
        for conversion in conversions:
            with conversion.timed("files"):
                conversion.write_rest(statistics)
        progress.stage("writing")
        source_files = sources.records()
        results = [each.finish(data if each.calibrates else None, source_files) for each in conversions]
        job.finish()
    for conversion in conversions:
        remove_abandoned(default_job(conversion.place))
    return results


def _job(
    place: Place,
    conversions: Sequence[Conversion],
    found: Sequence[Branch],
    checkpoint: Checkpoint,
    data: CalibrationData | None,
    progress: Progress,
    workers: int | str,
) -> Job:
    if data is None:
        return Job()
    num_bytes = kept_bytes(checkpoint, found, data.windows.numel(), observes=_observes(conversions))
    device = torch_device(conversions[0].request.device)
    told = fingerprint(conversions, checkpoint, data, device)
    told["threads"] = threads_of_each(num_workers(workers, device, len(data.windows)))
    if is_cluster(workers):
        told["solved by"] = "a cluster"  # whose processors may round otherwise
    return open_job(place, told, conversions, checkpoint, progress, num_bytes=num_bytes)


def _observes(conversions: Sequence[Conversion]) -> bool:
    """Whether an output wants to know of the source's own activations."""
    return any(conversion.solved_plan is None for conversion in conversions)


def check_together(conversions: Sequence[Conversion]) -> None:
    """UsageError for outputs that would replace one another, or that do not share their calibration."""
    places: dict[Path, str] = {}
    for conversion in conversions:
        place = conversion.place.expanduser().resolve()
        for other, name in places.items():
            if place == other or place in other.parents or other in place.parents:
                raise UsageError(f"the outputs {name} and {conversion.place} are in each other's place")
        places[place] = str(conversion.place)
    shared = {_calibration(conversion) for conversion in conversions if conversion.calibrates}
    if len(shared) > 1:
        raise UsageError(
            "outputs of one pass share their calibration text, samples, seq_len, seed and device, and these do not",
            hint="convert them one by one",
        )


def _calibration(conversion: Conversion) -> tuple[object, ...]:
    request = conversion.request
    mixing = request.weights, request.packing, request.chat_template
    return request.calibration, request.samples, request.seq_len, request.seed, request.device, mixing


def _read(conversions: Sequence[Conversion], checkpoint: Checkpoint, progress: Progress) -> CalibrationData:
    request = conversions[0].request
    longest = checkpoint.spec.max_position_embeddings
    if request.seq_len > longest:
        raise UsageError(f"seq_len = {request.seq_len} is longer than the model's context of {longest} tokens")
    progress.stage("reading calibration data")
    begun = time.monotonic()
    data = calibration_windows(
        checkpoint.tokenizer(),
        request.calibration,
        samples=request.samples,
        seq_len=request.seq_len,
        seed=request.seed,
        weights=request.weights,
        packing=request.packing,
        chat_template=request.chat_template,
    )
    for conversion in conversions:
        conversion.timings["calibration data"] = time.monotonic() - begun
    return data


def _write_alone(conversion: Conversion, index: int) -> None:
    try:
        with conversion.timed("blocks"):
            conversion.write_alone()
    except LossError as error:
        raise LossOfOneError(error, index) from error


def _walked(
    conversions: Sequence[Conversion],
    found: Sequence[Branch],
    checkpoint: Checkpoint,
    data: CalibrationData,
    job: Job,
    progress: Progress,
    workers: int | str,
) -> Mapping[str, InputStatistics]:
    """Statistics of the source's own activations, if an output wants them; the others have got their blocks."""
    progress.stage("calibrating and solving" if found else "calibrating")
    begun = time.monotonic()
    device, observes = torch_device(conversions[0].request.device), _observes(conversions)
    with hired(workers, conversions, data.windows, device, observes=observes) as team, naming(checkpoint.path):
        walk = Walk(checkpoint, data.windows, found, device, progress, job, team, observes=observes)
        for branch in found:
            for conversion in (each for each in conversions if each in branch.outputs and len(branch.outputs) > 1):
                conversion.shares = True
        walk.run()
    for conversion in conversions:
        conversion.timings["blocks"] = time.monotonic() - begun
    return walk.statistics
