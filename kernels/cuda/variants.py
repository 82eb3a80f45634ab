"""The kernels that are worth compiling ahead: what tests check, and what `aphroquant doctor --build` prepares.

A folder beside this file lists its own in a module `variants.py`, as a tuple VARIANTS.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")

Macro = int | str | float | bool


@dataclass(frozen=True)
class KernelVariant:
    """One kernel with its macros, and what its machine code must be like.

    `max_spill_bytes` bounds spill stores and loads together. Each of `sass` must occur in the disassembly, none of
    `no_sass`. `tested` ones are compiled by the tests, all others by scripts/compile_kernels only; `prebuilt` ones are
    compiled by `aphroquant doctor --build`.
    """

    source: str
    entry: str
    macros: Mapping[str, Macro] = field(default_factory=dict)
    architectures: tuple[str, ...] = ARCHITECTURES
    max_spill_bytes: int = 0
    sass: tuple[str, ...] = ()
    no_sass: tuple[str, ...] = ()
    tested: bool = True
    prebuilt: bool = True

    def runs_on(self, architecture: str) -> bool:
        """Newer GPUs run what the newest listed one without features of its own ("a") runs."""
        if architecture in self.architectures:
            return True
        plain = [_number(name) for name in self.architectures if not name.endswith("a")]
        return bool(plain) and _number(architecture) >= min(plain)

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.macros.items())
        return f"{self.entry}({settings})"


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_").rstrip("a"))


def all_variants() -> list[KernelVariant]:
    """Of every folder that lists some."""
    found: list[KernelVariant] = []
    for path in sorted(Path(__file__).parent.glob("*/variants.py")):
        found += importlib.import_module(f"aphroquant.kernels.cuda.{path.parent.name}.variants").VARIANTS
    return found


def prebuilt_variants(architecture: str) -> list[KernelVariant]:
    """Those worth having in the cache of a GPU of that architecture."""
    return [variant for variant in all_variants() if variant.prebuilt and variant.runs_on(architecture)]
