"""One quantized weight: a scheme and its canonical tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.numbers import same_bytes
from aphroquant.schemes.additive import AdditiveScheme
from aphroquant.schemes.affine import AffineScheme
from aphroquant.schemes.dense import DenseScheme
from aphroquant.schemes.float8 import FloatScheme
from aphroquant.schemes.integer import IntegerScheme
from aphroquant.schemes.kquant import KQuantScheme
from aphroquant.schemes.lookup import LookupScheme
from aphroquant.schemes.trellis import TrellisScheme

Scheme = (
    IntegerScheme
    | AffineScheme
    | FloatScheme
    | LookupScheme
    | AdditiveScheme
    | TrellisScheme
    | KQuantScheme
    | DenseScheme
)

_PIECE_ELEMENTS = 2**20  # of a matrix that is dequantized to be compared
_GLOBAL_SCALE_TOLERANCE = 2**-24 * (1 + 2**-20)  # one rounding to float32, seen from either side


@dataclass(frozen=True)
class QuantizedWeight:
    """One linear layer's weight: a scheme, its canonical tensors, and the shape (N, K). The bias is not part of it."""

    scheme: Scheme
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]

    @classmethod
    def dense(cls, weight: Tensor) -> QuantizedWeight:
        return cls(DenseScheme(weight.dtype), {"weight": weight}, (weight.shape[0], weight.shape[1]))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __reduce__(self) -> tuple[Any, ...]:
        """Eight-bit floats travel as bytes: torch 2.13 pickles them in a form that it does not read itself."""
        stored = {name: (_as_bytes(tensor), tensor.dtype) for name, tensor in self.tensors.items()}
        return _unpickled, (self.scheme, stored, self.shape)

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same weight on a device."""
        return QuantizedWeight(self.scheme, {name: t.to(device) for name, t in self.tensors.items()}, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], computed in float32 (float64 if asked for) and cast to `dtype` once at the end."""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        return self.scheme.dequantize(self.tensors, self.shape, work).to(dtype)

    def same_values(self, other: QuantizedWeight) -> bool:
        """Whether both dequantize to the same float32 numbers, bit for bit.

        A global scale (NVFP4) may differ by 2**-24, its rounding to float32: some files hold it as a factor and others
        as a divisor, and neither has an exact reciprocal. All other numbers must then be the same bits.
        """
        if self.shape != other.shape:
            return False
        if self.scheme == other.scheme and all(_same_bits(self[name], other[name]) for name in self.tensors):
            return True  # nothing to compute: the usual case of a repacked weight
        if "global_scale" in self.tensors and self.scheme == other.scheme:
            return all(_same_tensor(name, self[name], other[name]) for name in self.tensors)
        from aphroquant.schemes.rows import split_rows_alike

        pairs = split_rows_alike(self, other, _PIECE_ELEMENTS)
        return all(_same_bits(ours.dequantize(), theirs.dequantize()) for ours, theirs in pairs)

    def group_index(self) -> Tensor:
        """The group of every input column, int64 [K]."""
        assert isinstance(self.scheme, IntegerScheme)
        return self.scheme.group_index(self.tensors, self.shape[1])

    def check(self, name: str) -> None:
        """Raise InputError if a tensor is missing or has the wrong shape or dtype. `name` is the module."""
        for tensor, shape in self.scheme.shapes(*self.shape).items():
            if tensor not in self.tensors:
                raise InputError(f"{name}: the {self.scheme} weight has no {tensor}")
            found = tuple(self[tensor].shape)
            if found != shape:
                raise InputError(f"{name}: {tensor} has shape {list(found)}, but {self.scheme} needs {list(shape)}")
        for tensor, dtype in self.scheme.dtypes().items():
            if self[tensor].dtype != dtype:
                raise InputError(f"{name}: {tensor} is {self[tensor].dtype}, but {self.scheme} needs {dtype}")

    @property
    def num_bits(self) -> int:
        """Bits of storage that the numbers need: codes at their bit width, everything else as its dtype."""
        bits = 0
        for name, tensor in self.tensors.items():
            width = self.scheme.storage_bits(name)
            bits += tensor.numel() * (tensor.element_size() * 8 if width is None else width)
        return bits


def _as_bytes(tensor: Tensor) -> Tensor:
    is_float8 = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.view(torch.uint8) if is_float8 else tensor


def _unpickled(
    scheme: Scheme, stored: Mapping[str, tuple[Tensor, torch.dtype]], shape: tuple[int, int]
) -> QuantizedWeight:
    tensors = {
        name: tensor if tensor.dtype == dtype else tensor.view(dtype) for name, (tensor, dtype) in stored.items()
    }
    return QuantizedWeight(scheme, tensors, shape)


def _same_tensor(name: str, ours: Tensor, theirs: Tensor) -> bool:
    if name in ("global_scale", "input_scale"):
        return torch.allclose(ours.double(), theirs.double(), rtol=_GLOBAL_SCALE_TOLERANCE, atol=0, equal_nan=True)
    return _same_bits(ours, theirs)


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    if ours is theirs:
        return True
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and same_bytes(ours, theirs)
