"""Evaluation text: files (or the bundled held-out part), read once, with hashes that say what was measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aphroquant.errors import InputError

SEPARATOR = "\n\n"  # between files


@dataclass(frozen=True)
class TextSource:
    """Where text came from: a file name, or "default" for the bundled text."""

    name: str
    sha256: str
    num_characters: int


def read_texts(paths: Sequence[str | Path] | str | Path | None) -> tuple[str, tuple[TextSource, ...]]:
    """The files' texts joined by an empty line, and what they were. Without paths: the bundled evaluation text."""
    if not paths:
        from aphroquant.calibration.data import default_text

        texts = [("default", default_text("evaluation"))]
    else:
        files = [paths] if isinstance(paths, str | Path) else paths
        texts = [(str(path), _read(Path(path))) for path in files]
    sources = tuple(TextSource(name, hashlib.sha256(text.encode()).hexdigest(), len(text)) for name, text in texts)
    return SEPARATOR.join(text for _, text in texts), sources


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from error
