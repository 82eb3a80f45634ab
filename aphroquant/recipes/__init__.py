"""Recipes: what is to be made of a source, measured, gated and published, as one YAML file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aphroquant.recipes.loading import load_recipe, read_recipe
    from aphroquant.recipes.models import Recipe

__all__ = ["Recipe", "load_recipe", "read_recipe"]

_LAZY = {"Recipe": "models", "load_recipe": "loading", "read_recipe": "loading"}


def __getattr__(name: str) -> Any:
    """Import pydantic's models when they are used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'aphroquant.recipes' has no attribute {name!r}")
    return getattr(importlib.import_module(f"aphroquant.recipes.{_LAZY[name]}"), name)
