"""Layers of several experts with bfloat16 weights, through torch's grouped product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.kernels.cuda.grouped.inputs import gather_inputs
from aphroquant.kernels.cuda.grouped.routing import sorted_on_gpu
from aphroquant.kernels.cuda.grouped.stacking import stack_biases
from aphroquant.kernels.reference.grouped import TokenGroups, check_experts, check_inputs
from aphroquant.schemes import QuantizedWeight

_ALIGNMENT = 8  # elements at a multiple of which the rows of a matrix begin


def unsupported(weights: Sequence[QuantizedWeight], dtype: torch.dtype) -> str | None:
    """Why torch's grouped product cannot run these experts on the current GPU, or None."""
    if dtype != torch.bfloat16:
        return f"torch multiplies grouped matrices of bfloat16, not of {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability() < (9, 0) or not hasattr(torch, "_grouped_mm"):
        return "torch multiplies grouped matrices on Hopper GPUs and newer"
    if any(size % _ALIGNMENT for size in weights[0].shape):
        return f"torch multiplies grouped matrices whose sizes are multiples of {_ALIGNMENT}"
    return None


class CudaGroupedDenseLinear:
    """y[place] = W_e x[token] + b_e in bfloat16, with float32 sums."""

    def __init__(
        self, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor] | None, device: torch.device | str
    ) -> None:
        check_experts(weights, biases)
        self.num_experts = len(weights)
        self.out_features, self.in_features = weights[0].shape
        self._matrices = torch.stack([weight["weight"].to(device, torch.bfloat16) for weight in weights])  # [E, N, K]
        self._biases = stack_biases(biases, device)

    def __call__(self, x: Tensor, groups: TokenGroups, *, in_order: bool = False) -> Tensor:
        """x [T, K], or with `in_order` [T * k, K] in the order of places -> [T * k, N] in that order."""
        check_inputs(x, groups, self.in_features, in_order)
        groups = sorted_on_gpu(groups, self.num_experts)
        if not groups.num_pairs:
            return x.new_empty(0, self.out_features)
        rows = gather_inputs(x.contiguous(), groups, None, in_order)
        y = torch._grouped_mm(rows, self._matrices.transpose(1, 2), offs=groups.offsets[1:])
        return y if self._biases is None else y + self._biases[groups.owners.long().clamp(0, self.num_experts - 1)]
