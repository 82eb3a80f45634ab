"""Which shapes of a layer each target takes, found by writing layers of many shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import format_class
from aphroquant.formats.gguf import BLOCK_TYPES
from aphroquant.schemes import AdditiveScheme, FloatScheme, LookupScheme, Scheme
from conversion_pairs.sources import PER_TOKEN, integers, random_weight

MODULE = "model.layers.0.mlp.up_proj"
STEPS = tuple(2**power for power in range(9))
LARGEST = STEPS[-1]


class Sizes(NamedTuple):
    """What a layer's sizes must be multiples of."""

    target: str
    numbers: str
    out_features: int
    in_features: int


# A scale a row where there may be one: a group's size, which in_features must be a multiple of, comes on top.
CASES: list[tuple[str, str, Scheme]] = [
    *((target, f"{bits} bit", integers(bits, None, False)) for target in ("gptq", "auto-round") for bits in (2, 3, 8)),
    *((target, "4 bit", integers(4, None, False)) for target in ("gptq", "awq", "compressed-tensors")),
    ("auto-round", "4 bit symmetric", integers(4, None, True)),
    ("auto-round", "4 bit with zero points", integers(4, None, False)),
    ("compressed-tensors", "NVFP4", LookupScheme("e2m1", 16, "e4m3")),
    ("compressed-tensors", "MXFP4", LookupScheme("e2m1", 32, "e8m0")),
    ("modelopt", "NVFP4", LookupScheme("e2m1", 16, "e4m3")),
    ("fp8", "FP8", FloatScheme("tensor", activations=PER_TOKEN)),
    ("bitsandbytes", "NF4", LookupScheme("nf4", 64, "float", flattened=True)),
    ("bitsandbytes", "LLM.int8", integers(8, None, True)),
    ("aqlm", "2x8", AdditiveScheme(2, 8)),
]


def measure_sizes() -> list[Sizes]:
    """The multiples that each case needs, in the order of the targets' names."""
    found = []
    for target, numbers, scheme in CASES:
        takes = _writer(target, scheme)
        rows = next(step for step in STEPS if all(takes(step * odd, LARGEST) for odd in (1, 3, 5)))
        columns = next(step for step in STEPS if all(takes(LARGEST, step * odd) for odd in (1, 3, 5)))
        found.append(Sizes(target, numbers, rows, columns))
    return sorted([*found, *_gguf_sizes()], key=lambda sizes: (sizes.target, sizes.numbers))


def _writer(target: str, scheme: Scheme) -> Callable[[int, int], bool]:
    written = format_class(target).for_schemes({MODULE: scheme}, [])

    def takes(rows: int, columns: int) -> bool:
        try:
            written.write(MODULE, random_weight(scheme, rows, columns))
        except (UsageError, InputError):  # of a scheme that has no such shape
            return False
        return True

    return takes


def _gguf_sizes() -> Iterator[Sizes]:
    """GGUF's types have blocks within a row."""
    names: dict[int, list[str]] = {}
    for kind in BLOCK_TYPES.values():
        names.setdefault(kind.block_size, []).append(kind.name)
    for size, types in names.items():
        yield Sizes("gguf", ", ".join(types), 1, size)
