"""How a peer, which runs in a library's own environment, is told what to quantize: `python PEER.py REQUEST.json`.

A request has `base` (a dense checkpoint), `out` (where the quantized one goes), `bits`, `group_size`, `symmetric`,
`token_ids` (calibration, the very windows that we calibrate on), `device`, and `answer`: the file that is told the
releases and the memory of the GPU. Nothing of aphroquant is imported, and torch only by the libraries that have it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def serve(quantize: Callable[[dict[str, Any]], None], *libraries: str) -> None:
    """Answer the request on the command line."""
    request = json.loads(Path(sys.argv[1]).read_text())
    quantize(request)
    answer = {"versions": {library: version(library) for library in libraries}}
    Path(request["answer"]).write_text(json.dumps(answer | _gpu_memory()))


def windows_of(request: dict[str, Any]) -> Tensor:
    """Calibration tokens [windows, length]; torch is seeded."""
    import torch

    torch.manual_seed(0)
    return torch.tensor(request["token_ids"])


def lift(place: Path) -> None:
    """Bring a checkpoint that a library put into a folder of its own making up into `place`."""
    if (place / "config.json").exists():
        return
    for path in next(place.rglob("config.json")).parent.iterdir():
        path.rename(place / path.name)


def _gpu_memory() -> dict[str, int]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"gpu_memory_bytes": torch.cuda.max_memory_allocated()}
