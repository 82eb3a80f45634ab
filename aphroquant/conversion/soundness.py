"""What must hold of a source before any work: it is whole, it is finite, and it is not what gets overwritten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.expected import expected_modules, expected_vectors
from aphroquant.errors import InputError, UsageError

_DAMAGED = "the file is damaged, or the model was trained badly; aphroquant inspect lists what is wrong with it"


def check_output_place(checkpoint: Checkpoint, out: Path) -> None:
    """UsageError if the output would replace the source, or a directory that the source is in."""
    source, target = checkpoint.path.resolve(), out.expanduser().resolve()
    if target == source or target in source.parents:
        raise UsageError(
            f"--out {out} holds the source {checkpoint.source}, which a conversion leaves as it is",
            hint="give another --out",
        )


def check_complete(checkpoint: Checkpoint) -> None:
    """InputError naming the first tensor that the model must have and the source has not."""
    try:
        spec = checkpoint.spec
    except InputError:
        return  # a family that can be repacked, but not run: nothing is known of what it must have
    schemes = checkpoint.schemes()
    missing = [f"{module}.weight" for module in expected_modules(spec) if module not in schemes]
    missing += [name for name in expected_vectors(spec) if name not in checkpoint.tensors]
    if missing:
        others = f", and so are {len(missing) - 1} others" if len(missing) > 1 else ""
        raise InputError(
            f"{checkpoint.source}: {missing[0]} is missing{others}",
            hint="the download is incomplete, or config.json belongs to another model",
        )


def check_carried(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """InputError naming the first of the tensors that hold something else than numbers."""
    for name in names:
        if name in checkpoint.tensors:
            for _ in finite_pieces(checkpoint, name, checkpoint.read_pieces(name)):
                pass


def finite_pieces(checkpoint: Checkpoint, name: str, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The pieces of a tensor as they are. InputError at the first with something else than numbers."""
    for piece in pieces:
        if not is_finite(piece):
            raise InputError(f"{checkpoint.source}: {name} holds NaN or infinite values", hint=_DAMAGED)
        yield piece


def check_codes(checkpoint: Checkpoint, module: str, tensors: Iterable[Tensor]) -> None:
    """InputError if the scales (or anything else) of a quantized module are not finite."""
    if not all(map(is_finite, tensors)):
        raise InputError(f"{checkpoint.source}: {module} holds NaN or infinite values", hint=_DAMAGED)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; integers always are."""
    if not tensor.dtype.is_floating_point:
        return True
    if tensor.dtype.itemsize == 1:  # torch has no isfinite for 8-bit floats
        codes = tensor.contiguous().view(torch.uint8)
        return not any((codes == code).any() for code in _codes_of_no_number(tensor.dtype))
    return bool(torch.isfinite(tensor).all())


@cache
def _codes_of_no_number(dtype: torch.dtype) -> list[int]:
    """The bytes that mean NaN or infinity in an 8-bit float."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return (~values.isfinite()).nonzero().flatten().tolist()
