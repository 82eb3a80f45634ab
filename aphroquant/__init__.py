"""Quantize a Hugging Face checkpoint, prove its quality, and serve it.

aphroquant.convert("org/model", to="awq", out="model-awq")
aphroquant.evaluate("model-awq", against="org/model").mean_kld
aphroquant.LLM("model-awq").chat([{"role": "user", "content": "Hello!"}])
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aphroquant.conversion import convert
    from aphroquant.engine.llm import LLM
    from aphroquant.engine.types import SamplingParams
    from aphroquant.evaluation import evaluate

__all__ = ["LLM", "SamplingParams", "convert", "evaluate"]

try:
    __version__ = version("aphroquant")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_LAZY = {
    "convert": "aphroquant.conversion",
    "evaluate": "aphroquant.evaluation",
    "LLM": "aphroquant.engine.llm",
    "SamplingParams": "aphroquant.engine.types",
}


def __getattr__(name: str) -> Any:
    """Import the public names when first used: `aphroquant --help` must not wait for torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'aphroquant' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
