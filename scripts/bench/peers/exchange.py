"""How a peer, which runs in a library's own environment, is told what to quantize: `python PEER.py REQUEST.json`.

A request has `base` (a dense checkpoint), `out` (where the quantized one goes), `bits`, `group_size`, `symmetric`,
`token_ids` (calibration, the very windows that we calibrate on) and `device`. Nothing of aphroquant is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def serve(quantize: Callable[[dict[str, Any]], None]) -> None:
    """Answer the request on the command line."""
    torch.manual_seed(0)
    request = json.loads(Path(sys.argv[1]).read_text())
    request["token_ids"] = torch.tensor(request["token_ids"])
    quantize(request)


def lift(place: Path) -> None:
    """Bring a checkpoint that a library put into a folder of its own making up into `place`."""
    if (place / "config.json").exists():
        return
    for path in next(place.rglob("config.json")).parent.iterdir():
        path.rename(place / path.name)
