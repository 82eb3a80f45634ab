"""The experts of a block on the device: chosen, sorted, multiplied and added up without a word from the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from aphroquant.engine.cuda.joining import join_weights
from aphroquant.errors import InputError
from aphroquant.kernels.cuda.fused.gated_activation import FusedGatedActivation
from aphroquant.kernels.cuda.grouped.choosing import choose_experts
from aphroquant.kernels.cuda.grouped.routing import combine, group_tokens
from aphroquant.kernels.dispatch import PreparedGroupedLinear
from aphroquant.models.spec import ExpertsSpec
from aphroquant.schemes import DenseScheme, QuantizedWeight

if TYPE_CHECKING:
    from aphroquant.engine.cuda.linears import Part

PrepareGrouped = Callable[[Sequence[QuantizedWeight]], PreparedGroupedLinear]
_MAX_PAIRS = 65535  # rows of a launch of the activation


class Experts:
    """[T, H] -> [T, H]: the weighted sums of each token's experts. `router` is [E, H], in the inputs' dtype."""

    def __init__(
        self, spec: ExpertsSpec, router: Tensor, gate_up: PreparedGroupedLinear, down: PreparedGroupedLinear
    ) -> None:
        self._spec, self._router, self._gate_up, self._down = spec, router, gate_up, down
        self._activation = FusedGatedActivation(spec.intermediate_size, router.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        step = max(1, _MAX_PAIRS // self._spec.top_k)
        parts = [self._forward(x[start : start + step]) for start in range(0, x.shape[0], step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty_like(x)

    def _forward(self, x: Tensor) -> Tensor:
        logits = self._logits(x)
        choice = choose_experts(logits, self._spec.top_k, self._spec.normalizes)
        groups = group_tokens(choice.ids, self._spec.num_experts)
        inner = cast(Tensor, self._activation(self._gate_up(x, groups), programmatic=True))
        return combine(self._down(inner, groups, in_order=True), groups, choice.weights)

    def _logits(self, x: Tensor) -> Tensor:
        """float32: rounded ones choose other experts."""
        if x.is_cuda:
            return torch.mm(x, self._router.T, out_dtype=torch.float32)
        return x.float() @ self._router.float().T


def make_experts(
    spec: ExpertsSpec,
    router: Tensor,
    parts: Mapping[str, Part],
    prepare: PrepareGrouped,
    device: torch.device,
    dtype: torch.dtype,
    prefix: str,
) -> Experts:
    """From a checkpoint's layers by their names in the block, which `prefix` names in errors."""
    gate_up, down = [], []
    for number in range(spec.num_experts):
        gate, up, last = (_moved(parts[name].weight, device, dtype) for name in spec.expert(number))
        joined = join_weights([gate, up])
        if joined is None:
            raise InputError(
                f"{prefix}.{spec.expert(number)[0]} is {gate.scheme}, and {spec.expert(number)[1]} {up.scheme}: the "
                "GPU needs them alike",
                hint="run with --device cpu",
            )
        gate_up.append(joined)
        down.append(last)
    return Experts(spec, router.to(device, dtype), prepare(gate_up), prepare(down))


def _moved(weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> QuantizedWeight:
    if isinstance(weight.scheme, DenseScheme):
        return QuantizedWeight.dense(weight["weight"].to(device, dtype))
    return weight.to(device)
