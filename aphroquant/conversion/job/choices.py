"""Bits that were chosen for a budget, kept in a job's directory: measuring them takes longer than many a block.

They are known before the job is opened, whose description they are part of. Each has a file of its own, named after a
hash of all that decides it; what is damaged, or of another request, is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aphroquant.checkpoint.disk import replace_file, telling_disk_errors

_NAME = "bits-{key}.json"
_KEY_LEN = 16


class ChoiceKeeper:
    """Keeps nothing."""

    def take(self, decided_by: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was chosen before, with the same `decided_by`."""
        return None

    def keep(self, decided_by: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
        """Remember a choice, as JSON holds it."""

    def finish(self) -> None:
        """The outputs are whole: nothing is needed any more."""


class KeptChoices(ChoiceKeeper):
    """Keeps them in the directory of a job, which may not be there yet."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.expanduser().resolve()

    def take(self, decided_by: Mapping[str, Any]) -> dict[str, Any] | None:
        path = self._path(decided_by)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            chosen = found["chosen"]
            return chosen if isinstance(chosen, dict) and found["sha256"] == _digest(chosen) else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def keep(self, decided_by: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
        if self._directory.exists() and not self._directory.is_dir():
            return  # whoever opens the job says so
        content = json.dumps({"sha256": _digest(chosen), "chosen": chosen}, indent=1)
        with telling_disk_errors(self._directory, lambda: 0):
            self._directory.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(decided_by), content.encode())

    def finish(self) -> None:
        if not self._directory.is_dir():
            return
        for path in kept_choices(self._directory):
            path.unlink(missing_ok=True)
        if not any(self._directory.iterdir()):
            self._directory.rmdir()

    def _path(self, decided_by: Mapping[str, Any]) -> Path:
        return self._directory / _NAME.format(key=_digest(decided_by)[:_KEY_LEN])


def kept_choices(directory: Path) -> Iterator[Path]:
    """The files of all choices in a job's directory."""
    return directory.glob(_NAME.format(key="*"))


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
