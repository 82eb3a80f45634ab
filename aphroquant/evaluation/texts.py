"""Evaluation texts: files (or the bundled held-out part), read once, with hashes that say what was measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aphroquant.checkpoint import Checkpoint
from aphroquant.errors import InputError, UsageError
from aphroquant.provenance.records import MANIFEST, OutputRecord

DEFAULT = "default"  # the name of the bundled text


@dataclass(frozen=True)
class TextSource:
    """Where text came from: a file name, or "default" for the bundled text."""

    name: str
    sha256: str
    num_characters: int


class EvaluationText(NamedTuple):
    """A text and what it was."""

    source: TextSource
    content: str


def read_texts(paths: Sequence[str | Path] | str | Path | None) -> tuple[EvaluationText, ...]:
    """Each file's text; of "default", or without paths, the bundled evaluation text. UsageError if two are the same."""
    files = [paths] if isinstance(paths, str | Path) else paths or [DEFAULT]
    texts = tuple(_text(str(path), _content(path)) for path in files)
    names: dict[str, str] = {}
    for text in texts:
        if text.source.sha256 in names:
            raise UsageError(f"the texts {names[text.source.sha256]} and {text.source.name} are the same; give it once")
        names[text.source.sha256] = text.source.name
    return texts


def calibrated_on(checkpoint: Checkpoint, texts: Sequence[EvaluationText]) -> tuple[str, ...]:
    """The names of those texts that the checkpoint was calibrated on, as its aphroquant.json records."""
    hashes = _calibration_hashes(checkpoint)
    return tuple(text.source.name for text in texts if text.source.sha256 in hashes)


def refuse_calibration_texts(checkpoint: Checkpoint, texts: Sequence[EvaluationText]) -> None:
    """UsageError if the checkpoint was calibrated on one of the texts: it would look better than it is."""
    if names := calibrated_on(checkpoint, texts):
        raise UsageError(
            f"{checkpoint.source} was calibrated on {names[0]}, as its {MANIFEST} says: on that text it looks better "
            "than it is",
            hint="give a text that calibration never saw, or allow it: --allow-calibration-text, in a recipe "
            "evaluation.allow_calibration_text",
        )


def _calibration_hashes(checkpoint: Checkpoint) -> frozenset[str]:
    """Of the files that the checkpoint was calibrated on; none if it does not say."""
    path = OutputRecord(checkpoint.path).manifest_path
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sources = (record["calibration"] or {}).get("sources", [])
        return frozenset(str(source["sha256"]) for source in sources)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return frozenset()  # no record, or one that is not ours: nothing is known


def _text(name: str, content: str) -> EvaluationText:
    return EvaluationText(TextSource(name, hashlib.sha256(content.encode()).hexdigest(), len(content)), content)


def _content(path: str | Path) -> str:
    if str(path) != DEFAULT:
        return _read(Path(path))
    from aphroquant.calibration.data import default_text

    return default_text("evaluation")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from error
