"""Rows of the quality table, each a JSON file: measured once, on whatever machine, and put together later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FIGURES = ("mean_kld", "mean_kld_stderr", "p999_kld", "top1_agreement", "perplexity", "base_perplexity")


@dataclass(frozen=True)
class Row:
    """What one way of quantizing gave at one width, and what it cost. `texts` holds the FIGURES of each text.

    `bits_per_weight` counts all that is stored for the linear layers of the blocks. `memory_mib` is the highest
    resident memory of the process that quantized, `gpu_memory_mib` what it had allocated on a GPU.
    """

    bits: str
    name: str
    conditions: Mapping[str, Any]
    machine: str
    versions: Mapping[str, str]
    bits_per_weight: float
    seconds: float | None
    processor_seconds: float | None
    memory_mib: float | None
    gpu_memory_mib: float | None
    texts: Mapping[str, Mapping[str, float]]

    @property
    def title(self) -> str:
        """The row, and what sets it apart from others of as many bits."""
        if self.bits.isdigit():
            return self.name
        return f"{self.name} {'symmetric' if self.bits.rstrip('s').isdigit() else self.bits}"


class OtherConditionsError(Exception):
    """A row is there already, and was measured with other settings."""


class Results:
    """A folder of rows. Without one, nothing is kept and nothing is found."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def find(self, bits: str, name: str, conditions: Mapping[str, Any]) -> Row | None:
        """The row, if it is there. OtherConditionsError if it was measured with other settings."""
        path = self._path(bits, name)
        if path is None or not path.exists():
            return None
        row = read_row(path)
        if row.conditions != conditions:
            raise OtherConditionsError(
                f"{path} was measured with {row.conditions}, not with {conditions}: move it away"
            )
        return row

    def keep(self, row: Row) -> None:
        path = self._path(row.bits, row.name)
        if path is None:
            return
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(asdict(row), indent=2) + "\n")
        scratch.replace(path)

    def _path(self, bits: str, name: str) -> Path | None:
        return self.folder and self.folder / f"{name}-{bits}.json"


def read_row(path: Path) -> Row:
    return Row(**json.loads(path.read_text()))


def read_rows(*folders: Path) -> list[Row]:
    """All rows, sorted by whole stored bits and then by KL divergence."""
    rows = [read_row(path) for folder in folders for path in sorted(folder.glob("*.json"))]
    return sorted(rows, key=lambda row: (-int(row.bits_per_weight), mean_kld(row)))


def mean_kld(row: Row) -> float:
    """Of the text that was measured first."""
    return next(iter(row.texts.values()))["mean_kld"]
