"""Converting from beginning to end: what `convert` and recipes ask for, as conversions that run together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from aphroquant.calibration.effort import DEFAULT_EFFORT
from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.conversion.arguments import make_request
from aphroquant.conversion.conversion import Conversion
from aphroquant.conversion.directory_run import DirectoryConversion
from aphroquant.conversion.gguf_run import GgufConversion
from aphroquant.conversion.job.choices import ChoiceKeeper, KeptChoices
from aphroquant.conversion.job.directory import default_job
from aphroquant.conversion.job.job import Place
from aphroquant.conversion.loss import LossError, refuse_loss
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.result import ConversionResult
from aphroquant.conversion.rotated import RotatedCheckpoint
from aphroquant.conversion.rules import ModuleRule
from aphroquant.conversion.targets import can_be_quantized_for
from aphroquant.conversion.team.cluster import connected
from aphroquant.conversion.team.hiring import check_workers
from aphroquant.conversion.together import LossOfOneError, check_together, run_together
from aphroquant.errors import UsageError


def convert(
    source: str | Path,
    *,
    to: str,
    out: str | Path,
    scheme: str | None = None,
    bits: int | float | None = None,
    size: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    solver: str | None = None,
    calibration: Sequence[str | Path] | str | Path | None = None,
    samples: int | None = None,
    seq_len: int = 512,
    seed: int = 0,
    ignore: Sequence[str] | str = (),
    overwrite: bool = False,
    device: str = "auto",
    requantize: bool = False,
    effort: str = DEFAULT_EFFORT,
    refine_steps: int | None = None,
    distill_steps: int | None = None,
    weights: Sequence[float] = (),
    packing: str = "stream",
    chat_template: str | Path | None = None,
    rules: Sequence[ModuleRule | str] = (),
    job: str | Path | Literal[False] | None = None,
    rotate: bool = False,
    workers: int | str = 1,
    kv_scales: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Quantize the checkpoint `source` into the directory `out` (for "gguf" also a file), in the format `to`.

    Left out arguments take the best that the target and the model allow: 4 bits, the largest usual group size that
    divides every layer, zero points (not for compressed-tensors, whose other readers run them only dequantized), the
    solver with the lowest measured divergence, the bundled calibration texts.
    A source that is quantized already, in numbers that `to` can hold, is repacked without loss. If it cannot, or other
    numbers are asked for, it is an error without `requantize`, which allows a loss. The directory appears only when it
    is complete. `samples` = 0 does without calibration (rtn, FP8); GGUF's encoders use `calibration` if it is given.
    `device` calibrates and solves: "auto" (a GPU if there is one), "cpu" or "cuda".
    `effort` is "fast", "normal" or "best": it decides what is left out of `solver`, `samples`, `refine_steps` (steps of
    training a block against the source's) and `distill_steps` (of the whole model against the source's logits).
    `bits` as a float (3.5) is an average, scales and zero points included, and `size` the bytes of all tensors: then
    the bits of each layer are chosen for the least divergence, of those widths that `to` can hold.
    Of several `calibration` texts, `weights` are their shares of the windows; "default" among them is the bundled set.
    With `packing` "documents" windows begin where texts do; `chat_template` is a file in place of the model's template.
    `rules` give some modules another scheme or solver, or leave them dense: "down_proj: bits=8", "layers[0:2]: keep".
    `job` is the directory in which a calibrated conversion keeps what is done, so that the same call goes on after a
    kill; left out it is `.NAME.job` beside `out`, and with False nothing is kept. It is removed in the end.
    `kv_scales` finds the scales of an FP8 KV cache on the calibration text and stores them.
    `rotate` first writes a dense source in rotated channels, which changes no function: see conversion/rotated.py.
    `workers` processes share the calibration, each on a part of the windows and of the layers; with "auto" there is one
    for each GPU. The output does not depend on how many there are.
    """
    request = make_request(
        source,
        to=to,
        out=out,
        scheme=scheme,
        bits=bits,
        size=size,
        group_size=group_size,
        symmetric=symmetric,
        solver=solver,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        ignore=ignore,
        overwrite=overwrite,
        device=device,
        requantize=requantize,
        effort=effort,
        refine_steps=refine_steps,
        distill_steps=distill_steps,
        weights=weights,
        packing=packing,
        chat_template=chat_template,
        rules=rules,
        rotate=rotate,
        kv_scales=kv_scales,
    )
    return convert_all([request], job=job, workers=workers, dry_run=dry_run, progress=progress)[0]


def convert_all(
    requests: Sequence[ConversionRequest],
    *,
    job: str | Path | Literal[False] | None = None,
    workers: int | str = 1,
    dry_run: bool = False,
    progress: Progress | None = None,
    names: Sequence[str] = (),
) -> list[ConversionResult]:
    """Several outputs of one source from one pass over it; results in the order of `requests`.

    Those that calibrate must agree on text, samples, seq_len, seed and device; all on the rotation, if there is one.
    Each output is what it would be alone.
    The `job` of all of them is beside the first that calibrates, if no place is given. `names` are what notes and
    warnings call the outputs; left out, those of their files.
    """
    assert requests and len({request.source for request in requests}) == 1
    check_workers(workers, requests[0].device, max(request.samples for request in requests))
    place = Path(job) if isinstance(job, str) else job
    with nullcontext() if dry_run else connected(workers):
        return _converted(requests, place, workers, dry_run, progress or Progress(), names)


def _converted(
    requests: Sequence[ConversionRequest],
    place: Place,
    workers: int | str,
    dry_run: bool,
    say: Progress,
    names: Sequence[str],
) -> list[ConversionResult]:
    """Planned and run; again from the beginning where the source's own numbers turn out not to do for an output."""
    checkpoint = opened_source(requests)
    tellers = [say.of(name) for name in names or [request.out.name for request in requests]]
    if len(requests) == 1:
        tellers = [say]
    reasons: list[str | None] = [None] * len(requests)
    choices = ChoiceKeeper() if place is False else KeptChoices(place or default_job(requests[0].out))
    while True:
        conversions = []
        try:
            for index, request in enumerate(requests):
                conversions.append(
                    planned_conversion(
                        request, checkpoint, tellers[index], reasons[index], measures=not dry_run, choices=choices
                    )
                )
            check_together(conversions)
            if dry_run:
                return [conversion.preview() for conversion in conversions]
            results = run_together(conversions, checkpoint, say, place, workers=workers)
            choices.finish()
            return results
        except LossError as error:
            index = error.index if isinstance(error, LossOfOneError) else len(conversions)
            request = requests[index]
            if not request.requantize or not can_be_quantized_for(request.to):
                raise refuse_loss(checkpoint, request, error.message) from error
            told = f"the source is quantized already and is quantized anew, with a loss, because {error.message}"
            tellers[index].note(told)
            reasons[index] = error.message


def opened_source(requests: Sequence[ConversionRequest]) -> Checkpoint:
    """The source of all of them, rotated if they ask for it."""
    checkpoint, first = open_checkpoint(requests[0].source), requests[0]
    if len({(request.rotate, request.seed if request.rotate else 0) for request in requests}) > 1:
        raise UsageError("outputs of one pass are all rotated by one seed, or none is", hint="convert them one by one")
    return RotatedCheckpoint(checkpoint, first.seed) if first.rotate else checkpoint


def planned_conversion(
    request: ConversionRequest,
    checkpoint: Checkpoint,
    progress: Progress,
    reason: str | None,
    *,
    measures: bool,
    choices: ChoiceKeeper | None = None,
) -> Conversion:
    """A conversion that is checked and not begun. `reason` is why the source's own numbers cannot stay, if known.

    Without `measures` bits that are to be chosen are guessed; `choices` keeps those that were measured."""
    kind = GgufConversion if request.to == "gguf" else DirectoryConversion
    conversion = kind(request, checkpoint, progress, reason=reason, measures=measures, choices=choices)
    if isinstance(checkpoint, RotatedCheckpoint):
        conversion.note(checkpoint.description)
    return conversion
