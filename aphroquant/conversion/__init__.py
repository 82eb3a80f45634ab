"""From a source checkpoint to a quantized one, block by block."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aphroquant.conversion.progress import Progress

if TYPE_CHECKING:
    from aphroquant.conversion.result import ConversionResult
    from aphroquant.conversion.run import convert

__all__ = ["ConversionResult", "Progress", "convert"]

_LAZY = {"ConversionResult": "result", "convert": "run"}


def __getattr__(name: str) -> Any:
    """Import the conversion when it is used: `aphroquant convert --help` must not wait for torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'aphroquant.conversion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"aphroquant.conversion.{_LAZY[name]}"), name)
