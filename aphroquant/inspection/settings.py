"""What the settings of a quantized layer should be, by the shapes of its tensors and of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.expected import expected_modules
from aphroquant.errors import InputError

_WORD_BITS = 32


def fitting_settings(checkpoint: Checkpoint) -> str:
    """ "bits = 8 and group_size = 64 would fit": what most packed layers have, or "" if that cannot be known."""
    try:
        expected = expected_modules(checkpoint.spec)
    except InputError:
        return ""
    found: Counter[tuple[int, int]] = Counter()
    for module, (rows, columns) in expected.items():
        settings = _settings(_shapes(checkpoint, module), rows, columns)
        if settings is not None:
            found[settings] += 1
    if not found:
        return ""
    (bits, group_size), number = found.most_common(1)[0]
    return f"by their shapes, {number} of the layers have bits = {bits} and group_size = {group_size}"


def _shapes(checkpoint: Checkpoint, module: str) -> Mapping[str, tuple[int, ...]]:
    """Of those tensors of a module that are matrices."""
    suffixes = ("qweight", "scales", "weight_packed", "weight_scale")
    infos = {suffix: checkpoint.tensors.get(f"{module}.{suffix}") for suffix in suffixes}
    return {suffix: info.shape for suffix, info in infos.items() if info is not None and len(info.shape) == 2}


def _settings(shapes: Mapping[str, tuple[int, ...]], rows: int, columns: int) -> tuple[int, int] | None:
    """(bits, group size) of packed integers that make a weight [rows, columns]."""
    if "qweight" in shapes and "scales" in shapes:
        first, second = shapes["qweight"]
        words, groups = first * second, shapes["scales"][0]
    elif "weight_packed" in shapes and "weight_scale" in shapes:
        first, second = shapes["weight_packed"]
        words, groups = first * second, shapes["weight_scale"][1]
    else:
        return None
    if not groups or words * _WORD_BITS % (rows * columns) or columns % groups:
        return None
    bits = words * _WORD_BITS // (rows * columns)
    return (bits, columns // groups) if 1 <= bits <= 8 else None
