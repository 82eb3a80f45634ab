"""Lossless conversion: the same codes, scales and zero points in another format's tensors.

Every module is decoded, written, decoded again from what was written, and compared bit for bit after dequantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.plan import carried_bytes, carried_tensors, check_disk
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.soundness import check_codes
from aphroquant.errors import AphroquantError, UsageError
from aphroquant.formats import format_class
from aphroquant.formats.base import Format
from aphroquant.models.spec import EMBEDDING, LM_HEAD
from aphroquant.schemes import DenseScheme, Scheme


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

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each module."""
        return {module: self._measured[module][0] for module in self.schemes}

    @cached_property
    def module_bytes(self) -> dict[str, int]:
        return {module: self._measured[module][1] for module in self.schemes}

    @cached_property
    def dense_bytes(self) -> dict[str, int]:
        return {name: carried_bytes(self.checkpoint, name) for name in self.dense_names}

    @property
    def num_bytes(self) -> int:
        return sum(self.module_bytes.values()) + sum(self.dense_bytes.values())

    @property
    def bits_per_weight(self) -> float:
        weights = sum(rows * columns for rows, columns in self.modules.values())
        return 8 * sum(self.module_bytes.values()) / weights

    @cached_property
    def _measured(self) -> dict[str, tuple[tuple[int, int], int]]:
        """Shape and stored bytes of each module. One of each kind is decoded and written; headers tell the kind."""
        measured = {}
        by_kind: dict[tuple[Scheme, frozenset[tuple[str, tuple[int, ...]]]], tuple[tuple[int, int], int]] = {}
        headers: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
        for name, info in self.checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            headers.setdefault(module, set()).add((suffix, info.shape))
        for module, scheme in self.schemes.items():
            kind = scheme, frozenset(headers.get(module, {(module, ())}))
            if kind not in by_kind:
                weight = self.checkpoint.weight(module)
                written = self.format.write(module, weight)
                by_kind[kind] = weight.shape, sum(tensor.nbytes for tensor in written.values())
            measured[module] = by_kind[kind]
        return measured


def make_repack_plan(checkpoint: Checkpoint, request: ConversionRequest) -> RepackPlan | str:
    """The plan, or why the source's numbers cannot stay ("" if it has none)."""
    kept_dense = {EMBEDDING, LM_HEAD} if checkpoint.format is None else set()  # GGUF quantizes these; no target does
    schemes = {
        module: scheme
        for module, scheme in checkpoint.schemes().items()
        if not isinstance(scheme, DenseScheme) and module not in kept_dense
    }
    if not schemes:
        return ""
    if not all(request.accepts(scheme) for scheme in schemes.values()):
        return "the options ask for other numbers than it has"
    dense = [module for module in checkpoint.schemes() if module not in schemes and module != EMBEDDING]
    try:
        target = format_class(request.to).for_schemes(schemes, list(dict.fromkeys([*dense, LM_HEAD])))
        plan = RepackPlan(request, checkpoint, target, schemes)
        _check_places(target, schemes)
        num_bytes = plan.num_bytes
    except UsageError as error:
        return error.message
    check_disk(request.out, num_bytes)
    return plan


def repack_module(plan: RepackPlan, module: str) -> dict[str, Tensor]:
    """The tensors of one module in the new format, proved to mean the same numbers."""
    weight = plan.checkpoint.weight(module)
    check_codes(plan.checkpoint, module, weight.tensors.values())
    tensors = plan.format.write(module, weight)
    if not plan.format.read(module, tensors).same_values(weight):
        raise AphroquantError(f"{module}: repacking changed its values; nothing was written")
    return tensors


def _check_places(target: Format, schemes: Mapping[str, Scheme]) -> None:
    """Refuse formats that store several modules in one tensor."""
    for module in schemes:
        if target.place(module, "weight").entry is not None:
            raise UsageError(f"{module}: {target.name} stacks modules in one tensor, which is only read")
