"""The linear layers of a decoder on the device, those with the same input joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from aphroquant.engine.cuda.joining import join_biases, join_weights
from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, QuantizedWeight

Linear = Callable[[Tensor], Tensor]  # [T, K] -> [T, N], in the input's dtype
Prepare = Callable[[QuantizedWeight, Tensor | None], Linear]


class CodesLinear(Protocol):
    """A layer that takes FP8 codes [T, K] with a scale for each token [T], and gives a result in `dtype`."""

    def multiply_codes(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor: ...


def codes_linear(linear: Linear) -> CodesLinear | None:
    """The layer, if its inputs may come as codes: then whatever computes them quantizes them, too."""
    return cast(CodesLinear, linear) if getattr(linear, "takes_codes", False) else None


class Part(NamedTuple):
    """One layer of a checkpoint."""

    weight: QuantizedWeight
    bias: Tensor | None


def joint_linear(parts: Sequence[Part], prepare: Prepare, device: torch.device, dtype: torch.dtype) -> Linear:
    """One layer whose output is that of all parts side by side; dense weights are kept in `dtype`."""
    moved = [Part(_moved(part.weight, device, dtype), part.bias) for part in parts]
    joined = join_weights([part.weight for part in moved])
    if joined is None:
        return SeparateLinears([prepare(part.weight, part.bias) for part in _neighbours_joined(moved)])
    bias = join_biases([part.bias for part in parts], [part.weight.shape[0] for part in parts])
    return prepare(joined, bias)


def _neighbours_joined(parts: Sequence[Part]) -> list[Part]:
    """Those joined that can be: GGUF files often hold q and k in one scheme, and v in another."""
    found = [parts[0]]
    for part in parts[1:]:
        before = found[-1]
        joined = join_weights([before.weight, part.weight])
        if joined is None:
            found.append(part)
            continue
        bias = join_biases([before.bias, part.bias], [before.weight.shape[0], part.weight.shape[0]])
        found[-1] = Part(joined, bias)
    return found


class SeparateLinears:
    """Layers that share an input and nothing else."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = list(linears)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self._linears], dim=1)


class Head:
    """The output projection. Logits are float32, whatever the weights: rounded ones have ties."""

    def __init__(self, weight: QuantizedWeight, prepare: Prepare, device: torch.device, dtype: torch.dtype) -> None:
        moved = _moved(weight, device, dtype)
        if not isinstance(moved.scheme, IntegerScheme | FloatScheme | DenseScheme):  # numbers without a kernel
            moved = QuantizedWeight.dense(moved.dequantize(dtype))
        self._matrix = moved["weight"] if isinstance(moved.scheme, DenseScheme) else None
        self._linear = None if self._matrix is not None else prepare(moved, None)

    def __call__(self, x: Tensor) -> Tensor:
        """[R, H] -> float32 [R, V]."""
        if self._linear is not None:
            return self._linear(x).float()
        assert self._matrix is not None
        if x.is_cuda:
            return torch.mm(x, self._matrix.T, out_dtype=torch.float32)
        return x.float() @ self._matrix.float().T


def _moved(weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> QuantizedWeight:
    if isinstance(weight.scheme, DenseScheme):
        return QuantizedWeight.dense(weight["weight"].to(device, dtype))
    return weight.to(device)
