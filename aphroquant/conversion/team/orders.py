"""What the first worker tells the others before they begin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from aphroquant.conversion.request import ConversionRequest

READY = b"ready\n"  # the answer, when everything is planned


@dataclass(frozen=True)
class Orders:
    """Requests come with the reasons to quantize anew, if there are any. `errors` is the file to leave an error in."""

    requests: list[tuple[ConversionRequest, str | None]]
    windows: Tensor
    observes: bool
    address: str
    rank: int
    size: int
    num_threads: int
    errors: Path
