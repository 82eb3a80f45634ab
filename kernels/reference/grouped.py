"""Layers of several experts in plain torch: tokens sorted by expert, each expert's product, and the weighted sums back.

groups = group_tokens(expert_ids, num_experts)         # [T, k]: each token's experts
y = LoopedGroupedLinear(layers)(x, groups)             # [T * k, N], sorted by expert
out = combine(y, groups.places, weights)               # [T, N]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.schemes import QuantizedWeight


@dataclass(frozen=True)
class TokenGroups:
    """Pairs of a token and an expert, sorted by expert; pairs of one expert stay in their order.

    A pair whose id is no expert has no place. Sorted tensors have a row for every pair; what stands behind the last
    place in use is not defined.
    """

    num_experts: int
    rows: Tensor  # int32 [T * k]: the token of each place
    places: Tensor  # int32 [T, k]: the place of each pair, -1 for none
    offsets: Tensor  # int32 [experts + 1]: the first place of each expert

    @property
    def num_tokens(self) -> int:
        return self.places.shape[0]

    @property
    def num_pairs(self) -> int:
        return self.places.numel()


def group_tokens(expert_ids: Tensor, num_experts: int) -> TokenGroups:
    """expert_ids: int32 or int64 [T, k]."""
    check_ids(expert_ids, num_experts)
    ids = expert_ids.flatten().long()
    used = (ids >= 0) & (ids < num_experts)
    keys = torch.where(used, ids, num_experts)
    order = torch.argsort(keys, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0], device=order.device)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return TokenGroups(
        num_experts,
        (order // max(1, expert_ids.shape[1])).int(),
        torch.where(used, places, -1).view(expert_ids.shape).int(),
        offsets.int(),
    )


def check_ids(expert_ids: Tensor, num_experts: int) -> None:
    """UsageError unless they are int32 or int64 [T, k]."""
    if expert_ids.dim() != 2 or expert_ids.dtype not in (torch.int32, torch.int64):
        found = f"{expert_ids.dtype} {list(expert_ids.shape)}"
        raise UsageError(f"expert_ids is {found}, but must be int32 or int64 [tokens, experts of a token]")
    if num_experts < 1:
        raise UsageError(f"num_experts = {num_experts} must be positive")


def check_experts(weights: Sequence[QuantizedWeight], biases: Sequence[Tensor] | None) -> None:
    """UsageError unless all experts have one scheme and one shape, and all biases fit."""
    if not weights:
        raise UsageError("a grouped layer needs at least one expert")
    first = weights[0]
    for expert, weight in enumerate(weights):
        if weight.shape != first.shape or weight.scheme != first.scheme:
            raise UsageError(
                f"expert {expert} is {weight.scheme} {list(weight.shape)}, but expert 0 is {first.scheme} "
                f"{list(first.shape)}; the experts of a layer must be alike"
            )
    if biases is not None and [tuple(bias.shape) for bias in biases] != [(first.shape[0],)] * len(weights):
        raise UsageError(f"biases must be {len(weights)} of shape [{first.shape[0]}]")


def check_inputs(x: Tensor, groups: TokenGroups, in_features: int, in_order: bool) -> None:
    """UsageError unless x is [T, K], or with `in_order` [T * k, K]."""
    rows = groups.num_pairs if in_order else groups.num_tokens
    if tuple(x.shape) != (rows, in_features):
        raise UsageError(f"input has shape {list(x.shape)}, but must be [{rows}, {in_features}]")


class LoopedGroupedLinear:
    """y[place] = W_e x[token], one expert after another. `layers`: prepared linear layers, one an expert."""

    def __init__(self, layers: Sequence[Callable[[Tensor], Tensor]], out_features: int, in_features: int) -> None:
        self._layers = list(layers)
        self.num_experts, self.out_features, self.in_features = len(self._layers), out_features, in_features

    def __call__(self, x: Tensor, groups: TokenGroups, *, in_order: bool = False) -> Tensor:
        """x [T, K], or with `in_order` [T * k, K] in the order of places -> [T * k, N] in that order, in x's dtype."""
        check_inputs(x, groups, self.in_features, in_order)
        y = x.new_zeros(groups.num_pairs, self.out_features)
        ends = groups.offsets.tolist()
        rows = groups.rows.long()
        for layer, start, end in zip(self._layers, ends, ends[1:], strict=False):
            if end > start:
                y[start:end] = layer(x[start:end] if in_order else x[rows[start:end]])
        return y


def combine(y: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """[T * k, N] in the order of places, weights [T, k] -> [T, N] in y's dtype: sums in at least float32."""
    work = torch.float64 if y.dtype == torch.float64 else torch.float32
    sums = torch.zeros(places.shape[0], y.shape[1], dtype=work, device=y.device)
    for choice in range(places.shape[1]):
        place = places[:, choice]
        rows = torch.where((place >= 0)[:, None], y[place.clamp(min=0).long()].to(work), 0)
        sums += weights[:, choice, None].to(work) * rows
    return sums.to(y.dtype)
