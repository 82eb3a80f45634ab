"""Other projects' grouped products, timed beside ours on the same weights: torch's own, and vLLM's in a folder.

vLLM's Marlin kernel for experts is in another library of its wheel (_moe_C) than those for dense layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aphroquant.kernels.benchmark.expert_shapes import ExpertShape
from aphroquant.kernels.benchmark.peers import FP8_MAX, dense_weight, load_vllm
from aphroquant.kernels.cuda.grouped.inputs import gather_inputs
from aphroquant.kernels.cuda.grouped.routing import CudaTokenGroups
from aphroquant.schemes import FloatScheme, QuantizedWeight, Scheme

GroupedRun = Callable[..., Tensor]  # (x, groups, in_order=)


def _same(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    return weight


@dataclass(frozen=True)
class ExpertPeer:
    """A kernel: `make` prepares all experts' weights. `weight_of` says which numbers it gets."""

    name: str
    make: Callable[[Sequence[QuantizedWeight], ExpertShape], GroupedRun]
    weight_of: Callable[[QuantizedWeight, torch.dtype], QuantizedWeight] = _same
    exact: bool = True


def find_expert_peers(scheme: Scheme, dtype: torch.dtype, folder: Path | None) -> Iterator[ExpertPeer]:
    """Those that can run this scheme in this dtype here."""
    if dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm"):
        yield ExpertPeer("torch._grouped_mm bfloat16", _grouped_mm, dense_weight)
    if isinstance(scheme, FloatScheme) and scheme.granularity == "channel" and scheme.activations is not None:
        if dtype == torch.bfloat16 and hasattr(torch, "_scaled_grouped_mm"):
            yield ExpertPeer("torch._scaled_grouped_mm (inputs quantized before)", _scaled_grouped_mm)
        if folder is not None and load_vllm(folder) and hasattr(torch.ops._C, "cutlass_moe_mm"):
            yield ExpertPeer("vLLM CUTLASS experts (inputs quantized before)", partial(_cutlass, dtype=dtype))


def _grouped_mm(weights: Sequence[QuantizedWeight], shape: ExpertShape) -> GroupedRun:
    matrices = torch.stack([weight["weight"] for weight in weights])  # [E, N, K]
    return _TorchGrouped(matrices)


class _TorchGrouped:
    """A class, so that a deep copy has weights of its own."""

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices

    def __call__(self, x: Tensor, groups: CudaTokenGroups, *, in_order: bool) -> Tensor:
        rows = gather_inputs(x, groups, None, in_order)
        return torch._grouped_mm(rows, self.matrices.transpose(1, 2), offs=groups.offsets[1:])


class _QuantizedRows:
    """Sorted rows in FP8 with a scale each, made once for an input and kept."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[Tensor, CudaTokenGroups, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, groups: CudaTokenGroups, in_order: bool) -> tuple[Tensor, Tensor]:
        key = (x.data_ptr(), groups.rows.data_ptr())
        if key not in self._kept:
            rows = (x if in_order else x[groups.rows.long()]).float()
            scales = (rows.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=1e-8)
            self._kept[key] = (x, groups, (rows / scales).to(torch.float8_e4m3fn), scales)  # x: keeps its address
        return self._kept[key][2:]

    def __deepcopy__(self, memo: object) -> _QuantizedRows:
        return self


class _ScaledGrouped:
    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales, self.rows = codes, scales, _QuantizedRows()

    def __call__(self, x: Tensor, groups: CudaTokenGroups, *, in_order: bool) -> Tensor:
        rows, scales = self.rows(x, groups, in_order)
        return torch._scaled_grouped_mm(
            rows,
            self.codes.transpose(1, 2),
            scales[:, 0],
            self.scales,
            offs=groups.offsets[1:],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


def _stacked(weights: Sequence[QuantizedWeight]) -> tuple[Tensor, Tensor]:
    """Codes [E, N, K] and float32 scales [E, N]."""
    codes = torch.stack([weight["codes"].view(torch.uint8) for weight in weights]).view(torch.float8_e4m3fn)
    return codes, torch.stack([weight["scales"].float().reshape(-1) for weight in weights])


def _scaled_grouped_mm(weights: Sequence[QuantizedWeight], shape: ExpertShape) -> GroupedRun:
    return _ScaledGrouped(*_stacked(weights))


class _CutlassGrouped:
    """As vLLM calls it, its sizes of problems made on the GPU before."""

    def __init__(self, codes: Tensor, scales: Tensor, shape: ExpertShape, dtype: torch.dtype) -> None:
        self.codes, self.scales, self.shape, self.dtype, self.rows = codes, scales, shape, dtype, _QuantizedRows()
        experts, n, k = codes.shape
        self.strides = [torch.full((experts,), size, dtype=torch.int64, device=codes.device) for size in (k, k, n)]
        self._kept: dict[int, tuple[CudaTokenGroups, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, groups: CudaTokenGroups, *, in_order: bool) -> Tensor:
        rows, scales = self.rows(x, groups, in_order)
        operators: Any = torch.ops._C
        out = torch.empty(groups.num_pairs, self.shape.out_features, dtype=self.dtype, device=x.device)
        offsets, problems = self._problems(groups)
        operators.cutlass_moe_mm(
            out, rows, self.codes, scales, self.scales[..., None], offsets, problems, *self.strides, True, True
        )
        return out

    def _problems(self, groups: CudaTokenGroups) -> tuple[Tensor, Tensor]:
        """Each expert's first row, int64; and int32 [experts, 3]: tokens, outputs, inputs.

        With few tokens the first two are exchanged.
        """
        key = groups.offsets.data_ptr()
        if key not in self._kept:
            counts = groups.offsets.diff()
            n, k = (torch.full_like(counts, size) for size in (self.shape.out_features, self.shape.in_features))
            swapped = groups.num_pairs <= 64
            problems = torch.stack([n, counts, k] if swapped else [counts, n, k], 1).contiguous()
            self._kept[key] = (groups, groups.offsets[:-1].long(), problems)  # the groups keep their address
        return self._kept[key][1:]


def _cutlass(weights: Sequence[QuantizedWeight], shape: ExpertShape, dtype: torch.dtype) -> GroupedRun:
    return _CutlassGrouped(*_stacked(weights), shape, dtype)
