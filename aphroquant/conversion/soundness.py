"""What must hold of a source before any work: it is whole, it is finite, and it is not what gets overwritten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from aphroquant import buffers
from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.directory import is_one_of_several
from aphroquant.checkpoint.expected import expected_modules, expected_vectors
from aphroquant.errors import InputError, UsageError
from aphroquant.numbers import is_finite
from aphroquant.schemes import DenseScheme

_DAMAGED = "the file is damaged, or the model was trained badly; aphroquant inspect --verify lists what is wrong"


def check_output_place(checkpoint: Checkpoint, out: Path) -> None:
    """UsageError if the output would replace the source, or a directory that it is in, or lie inside of it."""
    source, target = checkpoint.path.resolve(), out.expanduser().resolve()
    if target == source or target in source.parents:
        where = "is" if source.is_file() and target == source else "holds"
    elif source in target.parents:
        where = "is inside"
    else:
        return
    raise UsageError(
        f"--out {out} {where} the source {checkpoint.source}, which a conversion leaves as it is",
        hint=f"give a place outside of it, as {_beside(source, target)}",
    )


def _beside(source: Path, target: Path) -> Path:
    """A name for the output next to the source."""
    name = source.name if source.is_dir() else source.stem
    return source.with_name(f"{name}-quantized{'.gguf' if target.suffix == '.gguf' else ''}")


def check_complete(checkpoint: Checkpoint) -> None:
    """InputError naming the first tensor that the model must have and the source has not, or has in another shape."""
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
            hint=f"the file is one of several; give the directory: {checkpoint.directory}"
            if is_one_of_several(checkpoint.path)
            else "the download is incomplete, or config.json belongs to another model",
        )
    shapes: dict[str, tuple[int, ...]] = {f"{module}.weight": shape for module, shape in expected_modules(spec).items()}
    shapes |= {name: (length,) for name, length in expected_vectors(spec).items()}
    for name, shape in shapes.items():
        info = checkpoint.tensors.get(name)
        quantized = not isinstance(schemes.get(name.removesuffix(".weight")), DenseScheme | None)
        if info is not None and not quantized and info.shape != shape:
            raise InputError(
                f"{checkpoint.source}: {name} has shape {list(info.shape)}, and config.json wants {list(shape)}",
                hint="the file is damaged, or config.json belongs to another model",
            )


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """InputError if the tokenizer has to be rebuilt for the output, from a GGUF file's metadata, and cannot be."""
    if rebuilds_tokenizer(checkpoint):
        checkpoint.tokenizer()


def rebuilds_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether no tokenizer lies beside the weights that could be carried over as it is."""
    beside = any(path.name == "tokenizer.json" for path in checkpoint.carried_files())
    return checkpoint.format_name == "gguf" and not beside


def check_carried(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """InputError naming the first of the tensors that hold something else than numbers."""
    for name in names:
        if name in checkpoint.tensors:
            for _ in finite_pieces(checkpoint, name, checkpoint.read_pieces(name)):
                pass


def finite_pieces(checkpoint: Checkpoint, name: str, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The pieces of a tensor as they are. InputError at the first with something else than numbers."""
    with buffers.reused():
        for piece in pieces:
            if not is_finite(piece):
                raise InputError(f"{checkpoint.source}: {name} holds NaN or infinite values", hint=_DAMAGED)
            yield piece


def check_codes(checkpoint: Checkpoint, module: str, tensors: Iterable[Tensor]) -> None:
    """InputError if the scales (or anything else) of a quantized module are not finite."""
    if not all(map(is_finite, tensors)):
        raise InputError(f"{checkpoint.source}: {module} holds NaN or infinite values", hint=_DAMAGED)
