"""Lossless conversion: the same codes, scales and zero points in another format's tensors.

Every module is decoded, written, decoded again from what was written, and compared bit for bit after dequantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.base import suffix
from aphroquant.conversion.loss import LossError, contradiction
from aphroquant.conversion.plan import (
    EXACT_DTYPE,
    carried_headers,
    carried_tensors,
    check_disk,
    is_dequantized,
    model_dtype,
)
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.scales import check_scales
from aphroquant.conversion.sizes import num_bytes
from aphroquant.conversion.soundness import check_codes
from aphroquant.errors import AphroquantError, UsageError
from aphroquant.formats import format_class
from aphroquant.formats.base import Format, Part, TensorHeader
from aphroquant.formats.reading import headers_of
from aphroquant.models.spec import EMBEDDING, LM_HEAD
from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, QuantizedWeight, Scheme

_Kind = tuple[Scheme, frozenset[tuple[str, tuple[int, ...]]]]  # of modules that are stored alike


@dataclass(frozen=True)
class RepackPlan:
    """Which modules move to which format, unchanged. `schemes` are those of the source."""

    request: ConversionRequest
    checkpoint: Checkpoint
    format: Format
    schemes: Mapping[str, Scheme]

    @cached_property
    def dense_names(self) -> list[str]:
        """Tensors that are carried over."""
        return carried_tensors(self.checkpoint, set(self.schemes))

    @property
    def dequantized(self) -> list[str]:
        """Of these, the ones that only the source quantizes."""
        return [name for name in self.dense_names if is_dequantized(self.checkpoint, name)]

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each module."""
        return {module: self._measured[module][0] for module in self.schemes}

    @cached_property
    def module_headers(self) -> dict[str, dict[str, TensorHeader]]:
        """What each module will be stored as, by suffix."""
        return {module: self._measured[module][1] for module in self.schemes}

    @cached_property
    def module_bytes(self) -> dict[str, int]:
        return {module: num_bytes(headers) for module, headers in self.module_headers.items()}

    @cached_property
    def dense_headers(self) -> dict[str, TensorHeader]:
        """What each carried tensor will be, by the names that it gets."""
        return carried_headers(self.checkpoint, self.dense_names, self.request.to, EXACT_DTYPE)

    @property
    def num_bytes(self) -> int:
        return sum(self.module_bytes.values()) + num_bytes(self.dense_headers)

    @property
    def bits_per_weight(self) -> float:
        weights = sum(rows * columns for rows, columns in self.modules.values())
        return 8 * sum(self.module_bytes.values()) / weights

    def size_in_work(self, module: str) -> int:
        """Its weights, fourfold if its numbers are more than codes and scales, whose decoding takes more memory."""
        ordinary = isinstance(self.schemes[module], IntegerScheme | FloatScheme)
        return math.prod(self.modules[module]) * (1 if ordinary else 4)

    @property
    def stacks(self) -> Iterator[tuple[list[str], int]]:
        """Modules that share their tensors in the target, in order, with their number; most stand alone."""
        stacked: dict[str, dict[int, str]] = {}
        for module in self.schemes:
            place = self.format.place(module, "weight")
            stacked.setdefault(place.name, {})[place.entry or 0] = module
        for entries in stacked.values():
            yield [entries[number] for number in sorted(entries)], len(entries)

    @cached_property
    def _measured(self) -> dict[str, tuple[tuple[int, int], dict[str, TensorHeader]]]:
        """Shape of each module, and what is stored of it. One of each kind is decoded and written; headers tell the
        kind."""
        measured = {}
        by_kind: dict[_Kind, tuple[tuple[int, int], dict[str, TensorHeader]]] = {}
        headers = self._headers()
        for module, scheme in self.schemes.items():
            kind = scheme, frozenset(headers.get(module, {(module, ())}))
            if kind not in by_kind:
                weight = self.checkpoint.weight(module)
                by_kind[kind] = weight.shape, headers_of(self.format.write(module, weight))
            measured[module] = by_kind[kind]
        return measured

    def _headers(self) -> dict[str, set[tuple[str, tuple[int, ...]]]]:
        """(suffix, shape) of what each module has in the source."""
        headers: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
        for name, info in self.checkpoint.tensors.items():
            parts = [Part(name.rpartition(".")[0], suffix(name))]
            if self.checkpoint.format is not None:
                parts = self.checkpoint.format.locate(name, TensorHeader(info.dtype, info.shape))
            for module, part, entry in parts:
                headers.setdefault(module, set()).add((part, info.shape if entry is None else info.shape[1:]))
        return headers


def make_repack_plan(checkpoint: Checkpoint, request: ConversionRequest) -> RepackPlan | None:
    """The plan; None for a dense source. LossError saying why the source's numbers cannot stay."""
    format_type = format_class(request.to)
    # GGUF quantizes these; no target does
    kept_dense = {EMBEDDING, LM_HEAD} if checkpoint.format is None else format_type.left_dense
    schemes = {
        module: scheme
        for module, scheme in checkpoint.schemes().items()
        if not isinstance(scheme, DenseScheme) and module not in kept_dense
    }
    if not schemes:
        return None
    for scheme in schemes.values():
        reason = contradiction(request, scheme)
        if reason is not None:
            raise LossError(reason)
    # A head that is tied to the embedding is not stored, and dense all the same.
    others = [module for module in (*checkpoint.schemes(), LM_HEAD) if module not in schemes and module != EMBEDDING]
    try:
        target = format_type.for_schemes(schemes, list(dict.fromkeys(others)))
        target = target.for_model(model_dtype(checkpoint), checkpoint.format)
        plan = RepackPlan(request, checkpoint, target, schemes)
        size = plan.num_bytes
    except UsageError as error:
        raise LossError(error.message) from error
    check_disk(request.out, size)
    check_scales(checkpoint, [name for name, held in schemes.items() if isinstance(held, IntegerScheme)], request.to)
    return plan


class Fetched:
    """A module whose bytes are read, and forgotten once they are decoded."""

    def __init__(self, checkpoint: Checkpoint, module: str) -> None:
        self.module = module
        self._decode: Callable[[], QuantizedWeight] | None = checkpoint.fetched(module)

    def decoded(self) -> QuantizedWeight:
        """The weight, once."""
        decode, self._decode = self._decode, None
        assert decode is not None, f"{self.module} is decoded once"
        return decode()


def fetched_modules(plan: RepackPlan, modules: Iterable[str]) -> Iterator[tuple[Fetched, int]]:
    """All of them in order, and how large each is in work."""
    for module in modules:
        yield Fetched(plan.checkpoint, module), plan.size_in_work(module)


def repack_module(plan: RepackPlan, fetched: Fetched) -> tuple[dict[str, Tensor], bool]:
    """The tensors of one module in the new format, proved to mean the same numbers, and whether a global scale had to
    be rounded."""
    module, weight = fetched.module, fetched.decoded()
    check_codes(plan.checkpoint, module, weight.tensors.values())
    try:
        tensors = plan.format.write(module, weight)
    except UsageError as error:  # found only in the numbers: a scale beyond float16
        raise LossError(error.message) from error
    found = plan.format.read(module, tensors)
    if not found.same_values(weight):
        raise AphroquantError(f"{module}: repacking changed its values; nothing was written")
    return tensors, _rescaled(found, weight)


class Stack:
    """The tensors of modules that the target stores as entries of common ones, made when the first entry comes."""

    def __init__(self, num_entries: int) -> None:
        self._num_entries = num_entries
        self.tensors: dict[str, Tensor] = {}

    def put(self, name: str, entry: int, tensor: Tensor) -> None:
        if name not in self.tensors:
            self.tensors[name] = torch.empty(self._num_entries, *tensor.shape, dtype=tensor.dtype)
        if self.tensors[name].shape[1:] != tensor.shape:
            raise LossError(f"entry {entry} of {name} has shape {list(tensor.shape)}, unlike those before it")
        self.tensors[name][entry] = tensor


def _rescaled(found: QuantizedWeight, weight: QuantizedWeight) -> bool:
    if "global_scale" not in weight.tensors or "global_scale" not in found.tensors:
        return False
    return not torch.equal(found["global_scale"], weight["global_scale"])
