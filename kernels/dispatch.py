"""Which kernels run: CUDA if asked for, the compiled CPU library where it can be used, else plain torch.

A choice carries its reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.schemes import QuantizedWeight

if TYPE_CHECKING:
    from aphroquant.kernels.reference.grouped import TokenGroups

BACKENDS = ("auto", "reference", "cpu", "cuda")


class PreparedLinear(Protocol):
    """A linear layer ready to run: [T, K] -> [T, N] in the input's dtype."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor: ...


class PreparedGroupedLinear(Protocol):
    """Layers of several experts, ready to run: [T, K], or with `in_order` [T * k, K] -> [T * k, N], by places."""

    num_experts: int
    in_features: int
    out_features: int

    def __call__(self, x: Tensor, groups: TokenGroups, *, in_order: bool = False) -> Tensor: ...


class Backend(Protocol):
    """Turns weights into layers that run. `reason` says why this one was chosen."""

    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str: ...

    def prepare(self, weight: QuantizedWeight, bias: Tensor | None) -> PreparedLinear: ...

    def prepare_grouped(
        self, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor] | None
    ) -> PreparedGroupedLinear: ...


@dataclass(frozen=True)
class ReferenceBackend:
    """Plain torch."""

    reason: str
    name: str = "reference"

    def prepare(self, weight: QuantizedWeight, bias: Tensor | None) -> PreparedLinear:
        from aphroquant.kernels.reference.linear import ReferenceLinear

        return ReferenceLinear(weight, bias)

    def prepare_grouped(
        self, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor] | None
    ) -> PreparedGroupedLinear:
        return prepare_one_by_one(self, weights, biases)


@dataclass(frozen=True)
class CpuBackend:
    """The compiled library. Layers that it cannot compute run on the reference."""

    reason: str
    activations: str
    name: str = "cpu"

    def prepare(self, weight: QuantizedWeight, bias: Tensor | None) -> PreparedLinear:
        from aphroquant.kernels.cpu.inputs import unsupported
        from aphroquant.kernels.cpu.linear import CpuLinear
        from aphroquant.kernels.reference.linear import ReferenceLinear

        if unsupported(weight.scheme):
            return ReferenceLinear(weight, bias)
        return CpuLinear(weight, bias, activations=self.activations)

    def prepare_grouped(
        self, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor] | None
    ) -> PreparedGroupedLinear:
        return prepare_one_by_one(self, weights, biases)


def prepare_one_by_one(
    backend: Backend, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor] | None
) -> PreparedGroupedLinear:
    """A layer of several experts that runs the backend's layer of one expert after another."""
    from aphroquant.kernels.reference.grouped import LoopedGroupedLinear, check_experts

    check_experts(weights, biases)
    layers = [
        backend.prepare(weight, None if biases is None else biases[expert]) for expert, weight in enumerate(weights)
    ]
    return LoopedGroupedLinear(layers, *weights[0].shape)


def select_backend(name: str = "auto", *, activations: str = "int8") -> Backend:
    """The backend called `name`. "auto" takes the CPU's, and falls back to the reference with one
    warning a process.

    `activations`: the input of weight-only integer layers on the CPU, "int8" (fast) or "float" (exact).
    """
    from aphroquant.kernels.cpu.library import instruction_sets, obstacle

    if name not in BACKENDS:
        raise UsageError(f"backend = {name!r} must be one of {', '.join(BACKENDS)}")
    if activations not in ("int8", "float"):
        raise UsageError(f"activations = {activations!r} must be int8 or float")
    if name == "reference":
        return ReferenceBackend("asked for")
    if name == "cuda":
        return _cuda_backend()
    reason = obstacle()
    if reason is None:
        return CpuBackend(f"compiled for this processor ({instruction_sets()[0]})", activations)
    if name == "cpu":
        raise UsageError(
            f"backend cpu cannot be used: {reason}", hint="install a C++ compiler and reinstall the package"
        )
    warn_fallback()
    return ReferenceBackend(reason)


def _cuda_backend() -> Backend:
    from aphroquant.kernels.cuda.backend import CudaBackend
    from aphroquant.kernels.cuda.device import architecture, obstacle

    if reason := obstacle():
        raise UsageError(f"backend cuda cannot be used: {reason}", hint="`aphroquant doctor` shows what is usable")
    return CudaBackend(f"compiled for this GPU ({architecture()})")


@cache
def warn_fallback() -> None:
    """Say once that everything will be slow, and why."""
    from aphroquant.kernels.cpu.library import obstacle

    warnings.warn(f"the reference kernels run, which are slow: {obstacle()}", RuntimeWarning, stacklevel=3)
