"""Tries every pair of a source and a target format with `convert`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aphroquant.conversion import convert
from aphroquant.errors import AphroquantError, UsageError
from aphroquant.schemes import QuantizedWeight
from conversion_pairs.sources import SOURCES, Source, path_of, write_source

TARGETS = (
    "gptq", "awq", "auto-round", "compressed-tensors", "fp8", "modelopt", "mxfp4", "bitsandbytes", "hqq", "aqlm",
    "gguf",
)  # fmt: skip
LOSSLESS, ROUNDED, REQUANTIZE, IMPOSSIBLE = "lossless", "rounded", "--requantize", "impossible"
_WITHOUT_CALIBRATION: dict[str, dict[str, Any]] = {"modelopt": {"scheme": "fp8-dynamic"}}


class Pair(NamedTuple):
    """What becomes of a source in a target format, and why it is not lossless."""

    source: Source
    target: str
    verdict: str
    reason: str


class Written(NamedTuple):
    """A lossless conversion's output, and what the source's weights were."""

    pair: Pair
    out: Path
    weights: dict[str, QuantizedWeight]


def measure(folder: Path) -> list[Pair]:
    """All pairs. Needs a little room in `folder`."""
    return [written.pair for written in try_pairs(folder)]


def try_pairs(folder: Path) -> Iterator[Written]:
    """All pairs, one after the other; the outputs are there until the next is asked for."""
    for source in SOURCES:
        place = folder / "source"
        weights = write_source(source, place)
        for target in TARGETS:
            out = folder / ("out.gguf" if target == "gguf" else "out")
            yield Written(_try(source, path_of(source, place), target, out), out, weights)
            for made in folder.glob("out*"):
                shutil.rmtree(made) if made.is_dir() else made.unlink()
        shutil.rmtree(place)


def _try(source: Source, path: Path, target: str, out: Path) -> Pair:
    try:
        result = convert(path, to=target, out=out)
    except UsageError as error:
        reason = _without_names(error.message)
    except AphroquantError as error:
        return Pair(source, target, IMPOSSIBLE, _without_names(error.message))
    else:
        rounded = result.outcome.startswith("lossless but")
        assert rounded or result.outcome.startswith("lossless:"), result.outcome
        return Pair(source, target, ROUNDED if rounded else LOSSLESS, "")
    assert not out.exists(), f"{source} to {target} left {out} behind"
    try:
        options = _WITHOUT_CALIBRATION.get(target, {})
        convert(path, to=target, out=out, requantize=True, samples=0, dry_run=True, **options)
    except AphroquantError:
        return Pair(source, target, IMPOSSIBLE, reason)
    return Pair(source, target, REQUANTIZE, reason)


def _without_names(message: str) -> str:
    """The rule in a refusal: what comes after the names of checkpoint and module, and before the scheme at hand."""
    rule = message.rpartition(": ")[2]
    for separator in (", not ", ", which ", ", and ", "; known are "):
        rule = rule.partition(separator)[0]
    return rule
