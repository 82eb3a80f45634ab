"""Schemes: what numbers a quantized weight is made of, with nothing said about bytes on disk or devices.

Formats read tensors into a `QuantizedWeight` and write one back; solvers make one from a dense weight; kernels prepare
one for a device. They meet only here.

Notation: a linear layer has a weight W [N, K] (N = out_features, K = in_features) and computes y = x @ W.T.
Codes are unsigned and zero points true (nothing is offset by one), whatever a file stores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError

Granularity = Literal["tensor", "channel", "block"]


@dataclass(frozen=True)
class ActivationScheme:
    """How the input of a linear layer is quantized at run time.

    `granularity` "tensor" needs a static `input_scale` unless `dynamic`; "token" is one scale a row; "group" is
    one scale for `group_size` consecutive columns of a row. Always symmetric.
    """

    kind: Literal["int", "float"]
    bits: int = 8
    dynamic: bool = True
    granularity: Literal["tensor", "token", "group"] = "token"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group_size is not None):
            raise UsageError(f"activation granularity {self.granularity!r} and group_size {self.group_size} contradict")


@dataclass(frozen=True)
class IntegerScheme:
    """W = (codes - zeros) * scales, or codes * scales + offsets, per group of `group_size` input columns.

    Tensors of the weight:
        codes   uint8 [N, K], 0 .. 2**bits - 1
        scales  float [N, G], G = ceil(K / group_size), or 1 when `group_size` is None (one group a row)
        zeros   uint8 [N, G], absent when `symmetric` (the zero point is then 2**(bits - 1))
        offsets float [N, G], instead of zeros when `has_offsets` (GGUF Q4_1: a real-valued minimum)
        group_index int32 [K], only when `act_order`: the group of input column k (default k // group_size)
        input_scale float32 [], only with static activations
    Scales may be negative (the full-range symmetric grid).
    """

    bits: int
    group_size: int | None
    symmetric: bool
    has_offsets: bool = False
    act_order: bool = False
    activations: ActivationScheme | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"bits = {self.bits} must be between 1 and 8")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"group_size = {self.group_size} must be positive, or None for one group a row")
        if self.symmetric and self.has_offsets:
            raise UsageError("a symmetric integer scheme has no offsets")

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size is None else math.ceil(in_features / self.group_size)

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        order = " act-order" if self.act_order else ""
        inputs = f" x {self.activations.kind}{self.activations.bits} inputs" if self.activations else ""
        return f"int{self.bits} {kind} {group}{order}{inputs}"


@dataclass(frozen=True)
class FloatScheme:
    """W = codes * scales with FP8 codes.

    Tensors: codes float8_e4m3fn [N, K]; scales float [] | [N, 1] | [ceil(N/r), ceil(K/c)] for granularity tensor |
    channel | block (`block_shape` = (r, c)); input_scale float32 [] with static activations. Without `activations`
    the layer is weight-only.
    """

    granularity: Granularity
    block_shape: tuple[int, int] | None = None
    activations: ActivationScheme | None = None
    dtype: torch.dtype = torch.float8_e4m3fn

    def __post_init__(self) -> None:
        if (self.granularity == "block") != (self.block_shape is not None):
            raise UsageError(f"granularity {self.granularity!r} and block_shape {self.block_shape} contradict")

    def __str__(self) -> str:
        where = f"block {self.block_shape[0]}x{self.block_shape[1]}" if self.block_shape else f"per {self.granularity}"
        if self.activations is None:
            return f"fp8 {where}"
        return f"fp8 {where} x fp8 {'dynamic' if self.activations.dynamic else 'static'} inputs"


@dataclass(frozen=True)
class KQuantScheme:
    """GGUF super-blocks of 256: W = d * sub_scales * codes - dmin * sub_mins.

    Tensors: codes uint8 [N, K] (for q6_k the stored value, 32 = zero); d float16 [N, K/256];
    q4_k: sub_scales, sub_mins uint8 [N, K/32], dmin float16 [N, K/256]; q6_k: sub_scales int8 [N, K/16].
    """

    kind: Literal["q4_k", "q6_k"]

    @property
    def bits(self) -> int:
        return 4 if self.kind == "q4_k" else 6

    def __str__(self) -> str:
        return self.kind.upper()


@dataclass(frozen=True)
class DenseScheme:
    """W as it is: one tensor, `weight` [N, K]."""

    dtype: torch.dtype

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


Scheme = IntegerScheme | FloatScheme | KQuantScheme | DenseScheme


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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], computed in float32 (float64 if asked for) and cast to `dtype` once at the end."""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        match self.scheme:
            case DenseScheme():
                return self["weight"].to(dtype)
            case IntegerScheme():
                return self._dequantize_integer(work).to(dtype)
            case FloatScheme():
                return self._dequantize_float(work).to(dtype)
            case KQuantScheme():
                return self._dequantize_kquant(work).to(dtype)

    def group_index(self) -> Tensor:
        """The group of every input column, int64 [K]."""
        assert isinstance(self.scheme, IntegerScheme)
        if "group_index" in self.tensors:
            return self["group_index"].long()
        columns = torch.arange(self.shape[1], device=self["codes"].device)
        return columns // (self.scheme.group_size or self.shape[1])

    def _dequantize_integer(self, work: torch.dtype) -> Tensor:
        assert isinstance(self.scheme, IntegerScheme)
        index = self.group_index()
        codes = self["codes"].to(work)  # [N, K]
        scales = self["scales"].to(work)[:, index]  # [N, G] -> [N, K]
        if self.scheme.has_offsets:
            return codes * scales + self["offsets"].to(work)[:, index]
        if self.scheme.symmetric:
            return (codes - 2 ** (self.scheme.bits - 1)) * scales
        return (codes - self["zeros"].to(work)[:, index]) * scales

    def _dequantize_float(self, work: torch.dtype) -> Tensor:
        assert isinstance(self.scheme, FloatScheme)
        scales = self["scales"].to(work)
        if self.scheme.block_shape is not None:
            rows, columns = self.scheme.block_shape
            scales = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            scales = scales[: self.shape[0], : self.shape[1]]  # edge blocks are partial
        return self["codes"].to(work) * scales

    def _dequantize_kquant(self, work: torch.dtype) -> Tensor:
        assert isinstance(self.scheme, KQuantScheme)
        out_features, in_features = self.shape
        sub_block = 32 if self.scheme.kind == "q4_k" else 16
        per_super = 256 // sub_block
        scales = self["d"].to(work).repeat_interleave(per_super, 1) * self["sub_scales"].to(work)
        codes = self["codes"].to(work).reshape(out_features, -1, sub_block)
        if self.scheme.kind == "q6_k":
            return ((codes - 32) * scales[..., None]).reshape(out_features, in_features)
        mins = self["dmin"].to(work).repeat_interleave(per_super, 1) * self["sub_mins"].to(work)
        return (codes * scales[..., None] - mins[..., None]).reshape(out_features, in_features)

    def check(self, name: str) -> None:
        """Raise InputError if a tensor is missing or has the wrong shape. `name` is the module, for the message."""
        expected = self._expected_shapes()
        for tensor, shape in expected.items():
            if tensor not in self.tensors:
                raise InputError(f"{name}: the {self.scheme} weight has no {tensor}")
            found = tuple(self[tensor].shape)
            if found != shape:
                raise InputError(f"{name}: {tensor} has shape {list(found)}, but {self.scheme} needs {list(shape)}")

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        n, k = self.shape
        match self.scheme:
            case DenseScheme():
                return {"weight": (n, k)}
            case IntegerScheme() as scheme:
                grouped = (n, scheme.num_groups(k))
                shapes: dict[str, tuple[int, ...]] = {"codes": (n, k), "scales": grouped}
                if scheme.has_offsets:
                    shapes["offsets"] = grouped
                elif not scheme.symmetric:
                    shapes["zeros"] = grouped
                if scheme.act_order:
                    shapes["group_index"] = (k,)
                return shapes
            case FloatScheme() as scheme:
                if scheme.block_shape is not None:
                    rows, columns = scheme.block_shape
                    return {"codes": (n, k), "scales": (math.ceil(n / rows), math.ceil(k / columns))}
                return {"codes": (n, k), "scales": () if scheme.granularity == "tensor" else (n, 1)}
            case KQuantScheme() as scheme:
                if scheme.kind == "q6_k":
                    return {"codes": (n, k), "d": (n, k // 256), "sub_scales": (n, k // 16)}
                sub = (n, k // 32)
                return {"codes": (n, k), "d": (n, k // 256), "dmin": (n, k // 256), "sub_scales": sub, "sub_mins": sub}

    @property
    def num_bits(self) -> int:
        """Bits of storage that the numbers need: codes at their bit width, everything else as its dtype."""
        bits = 0
        for name, tensor in self.tensors.items():
            width = tensor.element_size() * 8
            if isinstance(self.scheme, IntegerScheme | KQuantScheme) and name in ("codes", "zeros"):
                width = self.scheme.bits
            elif isinstance(self.scheme, KQuantScheme) and self.scheme.kind == "q4_k" and name.startswith("sub_"):
                width = 6
            bits += tensor.numel() * width
        return bits
