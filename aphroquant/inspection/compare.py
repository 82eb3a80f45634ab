"""compare(): whether two checkpoints, of whatever formats, are the same function, and where they differ.

Every matrix is compared as the numbers that it dequantizes to, a piece of both at a time; norms, biases and scales as
the numbers that they are. So a GPTQ file and its AWQ repacking are the same, and a GGUF file can be held against the
directory that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.base import is_kv_scale
from aphroquant.errors import InputError
from aphroquant.formats.kv_scales import SPELLINGS
from aphroquant.inspection.function import (
    Change,
    config_changes,
    file_changes,
    input_changes,
    same_bytes,
    tokenizer_changes,
)
from aphroquant.inspection.weights import Difference, Rows, Values, paired
from aphroquant.models.spec import EMBEDDING, LM_HEAD
from aphroquant.schemes import Scheme

OnProgress = Callable[[int, int], None]  # tensors compared, tensors in all
Verdict = Literal["same bytes", "same function", "different"]


@dataclass(frozen=True)
class Comparison:
    """Everything compared. A and B are the first and the second; errors are B's against A."""

    ours: str
    theirs: str
    formats: tuple[str, str]
    verdict: Verdict
    modules: tuple[Difference, ...]
    tensors: tuple[Difference, ...]
    only_ours: tuple[str, ...]
    only_theirs: tuple[str, ...]
    shapes: tuple[tuple[str, str], ...]  # name, "[2, 3] against [3, 2]"
    changes: tuple[Change, ...]

    @property
    def different_modules(self) -> list[Difference]:
        return [found for found in self.modules if not found.same_values]

    @property
    def different_tensors(self) -> list[Difference]:
        return [found for found in self.tensors if not found.same_values]

    @property
    def worst(self) -> Difference | None:
        """The matrix with the largest relative error; one with NaN is worse than any."""
        return max(self.different_modules, key=_badness, default=None)

    @property
    def norms_differ(self) -> bool:
        """As after AWQ and SmoothQuant, which scale channels in one layer and undo it in the next."""
        return any("norm" in found.name for found in self.different_tensors)

    def to_dict(self) -> dict[str, Any]:
        return {
            "a": self.ours,
            "b": self.theirs,
            "formats": list(self.formats),
            "verdict": self.verdict,
            "num_modules": len(self.modules),
            "num_different_modules": len(self.different_modules),
            "worst": None if self.worst is None else self.worst.name,
            "modules": [found.to_dict() for found in self.modules],
            "tensors": [found.to_dict() for found in self.tensors],
            "only_a": list(self.only_ours),
            "only_b": list(self.only_theirs),
            "shapes": [{"name": name, "shapes": text} for name, text in self.shapes],
            "changes": [change._asdict() for change in self.changes],
        }


def compare(ours: Checkpoint, theirs: Checkpoint, on_progress: OnProgress | None = None) -> Comparison:
    """Compare two opened checkpoints. InputError if a tensor of one of them cannot be read."""
    progress = on_progress or (lambda done, total: None)
    first, second = _Side(ours), _Side(theirs)
    names = [name for name in first.names if name in second.names]
    identical = _identical_files(ours, theirs)
    modules: list[Difference] = []
    tensors: list[Difference] = []
    shapes: list[tuple[str, str]] = []
    changes = [*config_changes(ours, theirs), *tokenizer_changes(ours, theirs), *file_changes(ours, theirs)]
    for number, name in enumerate(names if not identical else [], 1):
        found, other_shape = _compare_one(name, first, second)
        if found.shape != other_shape:
            shapes.append((name, f"{list(found.shape)} against {list(other_shape)}"))
        else:
            (modules if name in first.modules else tensors).append(found)
        if name in first.modules and name in second.modules:
            changes += input_changes(name, first.modules[name], second.modules[name])
        progress(number, len(names))
    only_ours = tuple(name for name in first.names if name not in second.names)
    only_theirs = tuple(name for name in second.names if name not in first.names)
    same = (
        not (only_ours or only_theirs or shapes)
        and all(found.same_values for found in (*modules, *tensors))
        and not any(change.changes_function for change in changes)
    )
    return Comparison(
        ours=str(ours.path),
        theirs=str(theirs.path),
        formats=(ours.format_name, theirs.format_name),
        verdict="same bytes" if identical else "same function" if same else "different",
        modules=tuple(modules),
        tensors=tuple(tensors),
        only_ours=only_ours,
        only_theirs=only_theirs,
        shapes=tuple(shapes),
        changes=tuple(changes),
    )


class _Side:
    """One of the two: matrices by module, other tensors by name, KV-cache scales under one spelling."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.modules: dict[str, Scheme] = dict(checkpoint.schemes())
        if LM_HEAD not in self.modules and EMBEDDING in self.modules and _is_tied(checkpoint):
            self.modules[LM_HEAD] = self.modules[EMBEDDING]  # so that a stored copy of it is no difference
        self.tensors = {
            _common_name(name): name
            for name in checkpoint.dense_names()
            if not (name.endswith(".weight") and name.removesuffix(".weight") in self.modules)
        }
        self.names: dict[str, None] = dict.fromkeys([*self.modules, *self.tensors])

    def scheme(self, name: str) -> str:
        if name in self.modules:
            return str(self.modules[name])
        return str(self.checkpoint.tensors[self.tensors[name]].dtype).removeprefix("torch.")

    def values(self, name: str) -> Rows | Values:
        """The numbers, flat, float32, in pieces."""
        if name in self.modules:
            stored = name if name in self.checkpoint.schemes() else EMBEDDING
            return Rows(self.checkpoint.weight_pieces(stored))
        stored = self.tensors[name]
        return Values(self.checkpoint.read_pieces(stored), self.checkpoint.tensors[stored].shape)


def _compare_one(name: str, first: _Side, second: _Side) -> tuple[Difference, tuple[int, ...]]:
    """The difference, with A's shape in it, and B's shape. Without the same shape it means nothing."""
    found = Difference(name, (), first.scheme(name), second.scheme(name))
    ours, theirs = first.values(name), second.values(name)
    for pair in paired(ours, theirs):
        found.add(*pair)
    found.shape = ours.shape
    return found, theirs.shape


def _badness(found: Difference) -> float:
    error = found.relative_error
    return float("inf") if error is None else error


def _is_tied(checkpoint: Checkpoint) -> bool:
    try:
        return checkpoint.spec.tie_word_embeddings
    except InputError:
        return checkpoint.config.get("tie_word_embeddings") is True


def _common_name(name: str) -> str:
    """The name itself; of a KV-cache scale, its first spelling."""
    if not is_kv_scale(name):
        return name
    for which in ("k", "v"):
        for spelling in SPELLINGS:
            ending = "." + spelling.format(x=which)
            if name.endswith(ending) and name.removesuffix(ending).endswith("self_attn"):
                return f"{name.removesuffix(ending)}.{which}_scale"
    return name


def _identical_files(ours: Checkpoint, theirs: Checkpoint) -> bool:
    """Whether both are the same bytes: all files of the weights, and beside them config and what is carried."""
    files = [_files(checkpoint) for checkpoint in (ours, theirs)]
    if files[0].keys() != files[1].keys():
        return False
    pairs = [(files[0][name], files[1][name]) for name in files[0]]
    if any(first.stat().st_size != second.stat().st_size for first, second in pairs):
        return False
    return all(same_bytes(first, second) for first, second in pairs)


def _files(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """By name; a lone file, whatever it is called, is "weights"."""
    if checkpoint.path.is_file():
        return {"weights": checkpoint.path}
    files = {info.file.name: info.file for info in checkpoint.tensors.values()}
    beside = [checkpoint.path / "config.json", *checkpoint.carried_files()]
    return files | {path.name: path for path in beside if path.exists()}
