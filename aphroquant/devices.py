"""Which device computes where a command has the choice."""

from __future__ import annotations

import torch

from aphroquant.errors import UsageError

DEVICES = ("auto", "cpu", "cuda")


def torch_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU if torch sees one. UsageError for "cuda" without a GPU."""
    if name not in DEVICES:
        raise UsageError(f"device = {name!r} must be one of {', '.join(DEVICES)}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            f"device cuda cannot be used: torch {torch.__version__} sees no GPU",
            hint="leave out --device cuda to compute on the CPU",
        )
    return torch.device("cuda", torch.cuda.current_device())
