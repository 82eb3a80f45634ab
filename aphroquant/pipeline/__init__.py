"""A recipe from beginning to end: plan, convert, verify, evaluate, gate, report, publish. What `pipeline run` does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aphroquant.pipeline.result import PipelineResult
    from aphroquant.pipeline.run import run_pipeline

__all__ = ["PipelineResult", "run_pipeline"]

_LAZY = {"PipelineResult": "result", "run_pipeline": "run"}


def __getattr__(name: str) -> Any:
    """Import the pipeline when it is used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'aphroquant.pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(f"aphroquant.pipeline.{_LAZY[name]}"), name)
