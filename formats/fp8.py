"""FP8 as vLLM's "fp8" and DeepSeek V3 store it: e4m3 codes with one scale for a tensor, or for each 128 x 128 block.

    per tensor: P.weight float8_e4m3fn [N, K]    P.weight_scale float32 []    P.input_scale float32 [], if static
    in blocks:  P.weight float8_e4m3fn [N, K]    P.weight_scale_inv float32 [ceil(N/128), ceil(K/128)]

W = weight * scale in every case: despite its name, `weight_scale_inv` is multiplied. Inputs are always quantized:
dynamic ones per token (in blocks: per token and 128 columns), static ones by `input_scale`. Scales of
`"scale_fmt": "ue8m0"` are powers of two, stored as float32, float8_e8m0fnu or exponent bytes; they are held and written
as float32.

Read as well: scales per channel ([N] or [N, 1]), grids padded past the last block, and transformers' names for scales
of a whole tensor (a scalar `weight_scale_inv`, `activation_scale`). transformers loads only the layout in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.schemes import ActivationScheme, FloatScheme, Granularity, QuantizedWeight, Scheme

CODES = torch.float8_e4m3fn
EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)
WEIGHT_SCALES = ("weight_scale_inv", "weight_scale", "scale")
INPUT_SCALES = ("input_scale", "activation_scale")
STATIC_INPUTS = ActivationScheme("float", dynamic=False, granularity="tensor")


@dataclass(frozen=True)
class Fp8(Format):
    """FP8 checkpoints of one kind: static or dynamic inputs, one block shape or none."""

    name: ClassVar[str] = "fp8"
    quant_method: ClassVar[str] = "fp8"
    tensor_names: ClassVar[frozenset[str]] = frozenset({"weight", *WEIGHT_SCALES, *INPUT_SCALES})

    static_inputs: bool
    block_shape: tuple[int, int] | None
    ignored_layers: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        activations = reading.read_text(config, "activation_scheme", default="dynamic")
        if activations not in ("static", "dynamic"):
            raise InputError(f"quantization_config: activation_scheme {activations!r} must be 'static' or 'dynamic'")
        fmt = reading.read_text(config, "fmt", default="e4m3")
        if fmt != "e4m3":
            raise InputError(f"quantization_config: FP8 codes with fmt {fmt!r} are not readable; 'e4m3' are")
        return cls(
            static_inputs=activations == "static",
            block_shape=_block_shape(config.get("weight_block_size")),
            ignored_layers=reading.read_names(config, "ignored_layers", "modules_to_not_convert"),
        )

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        held = {module: _held(module, scheme) for module, scheme in writing.quantized(schemes).items()}
        writing.same_for_all("fp8", "scheme", held)
        scheme = next(iter(held.values()), FloatScheme("tensor", activations=ActivationScheme("float")))
        ignored = writing.left_dense_with_head(schemes, dense_modules)
        assert scheme.activations is not None
        return cls(not scheme.activations.dynamic, scheme.block_shape, tuple(ignored))

    def quantization_config(self) -> dict[str, Any]:
        scheme = "static" if self.static_inputs else "dynamic"
        config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": scheme}
        if self.block_shape is None:
            return config | {"ignored_layers": list(self.ignored_layers)}
        return config | {
            "fmt": "e4m3",
            "weight_block_size": list(self.block_shape),
            "modules_to_not_convert": list(self.ignored_layers),
        }

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        if "weight" not in headers or headers["weight"].dtype != CODES:
            return None
        out_features, in_features = reading.require_matrix(module, headers, "weight", (CODES,))
        name = _first_of(module, headers, WEIGHT_SCALES)
        found = reading.require(module, headers, name, (*reading.SCALE_DTYPES, *EXPONENTS)).shape
        granularity: Granularity
        if math.prod(found) == 1 and (self.block_shape is None or len(found) < 2):
            granularity = "tensor"
        elif self.block_shape is None and found in ((out_features,), (out_features, 1)):
            granularity = "channel"
        elif self.block_shape is not None and _covers(found, (out_features, in_features), self.block_shape):
            granularity = "block"
        else:
            rule = f"blocks of {list(self.block_shape)}" if self.block_shape else "one scale for a tensor or a row"
            raise InputError(
                f"{module}.{name} has shape {list(found)}, but weight {[out_features, in_features]} needs {rule}"
            )
        block_shape = self.block_shape if granularity == "block" else None
        return FloatScheme(granularity, block_shape, self._activations(module, headers, block_shape))

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        headers = reading.headers_of(tensors)
        scheme = self.scheme(module, headers)
        assert isinstance(scheme, FloatScheme)
        codes = tensors["weight"]
        shape = (codes.shape[0], codes.shape[1])
        name = _first_of(module, headers, WEIGHT_SCALES)
        scales = _linear_scales(tensors[name])
        if scheme.block_shape is not None:
            scales = _without_padding(f"{module}.{name}", scales, _grid(shape, scheme.block_shape))
        else:
            scales = scales.reshape(() if scheme.granularity == "tensor" else (shape[0], 1))
        canonical = {"codes": codes, "scales": scales}
        if scheme.activations is not None and not scheme.activations.dynamic:
            canonical["input_scale"] = tensors[_first_of(module, headers, INPUT_SCALES)].float().reshape(())
        return QuantizedWeight(scheme, canonical, shape)

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        granularity: Granularity = "block" if self.block_shape else "tensor"
        activations = STATIC_INPUTS if self.static_inputs else _dynamic_inputs(self.block_shape)
        writing.checked(module, weight, FloatScheme(granularity, self.block_shape, activations))
        name = "weight_scale_inv" if self.block_shape else "weight_scale"
        scales = writing.exact_cast("fp8", module, "scales", weight["scales"], torch.float32)
        tensors = {"weight": weight["codes"].contiguous(), name: scales}
        if self.static_inputs:
            tensors["input_scale"] = weight["input_scale"].to(torch.float32).reshape(())
        return tensors

    def _activations(
        self, module: str, headers: Mapping[str, TensorHeader], block_shape: tuple[int, int] | None
    ) -> ActivationScheme:
        if not self.static_inputs:
            return _dynamic_inputs(block_shape)
        name = _first_of(module, headers, INPUT_SCALES)
        found = reading.require(module, headers, name, reading.SCALE_DTYPES).shape
        if math.prod(found) != 1:
            raise InputError(f"{module}.{name} has shape {list(found)}, but must be one number")
        return STATIC_INPUTS


def _held(module: str, scheme: Scheme) -> FloatScheme:
    """The scheme, if these files hold it."""
    if not isinstance(scheme, FloatScheme):
        raise UsageError(f"{module}: fp8 holds 8-bit floats, not {scheme}", hint=writing.REQUANTIZE)
    other = "write compressed-tensors, which can"
    if scheme.dtype != CODES:
        raise UsageError(f"{module}: fp8 holds float8_e4m3fn codes, not {scheme.dtype}", hint=writing.REQUANTIZE)
    if scheme.granularity == "channel":
        raise UsageError(f"{module}: fp8 cannot hold one scale a channel", hint=other)
    if scheme.activations is None:
        raise UsageError(f"{module}: fp8 always quantizes the inputs, so that it cannot hold {scheme}", hint=other)
    static = scheme.activations == STATIC_INPUTS and scheme.block_shape is None
    if not static and scheme.activations != _dynamic_inputs(scheme.block_shape):
        raise UsageError(f"{module}: fp8 cannot hold inputs quantized as {scheme.activations}", hint=other)
    return scheme


def _dynamic_inputs(block_shape: tuple[int, int] | None) -> ActivationScheme:
    if block_shape is None:
        return ActivationScheme("float")
    return ActivationScheme("float", granularity="group", group_size=block_shape[1])


def _block_shape(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise InputError(f"quantization_config: weight_block_size = {value!r} must be two positive integers")
    return value[0], value[1]


def _grid(shape: tuple[int, int], block_shape: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(shape[0] / block_shape[0]), math.ceil(shape[1] / block_shape[1])


def _covers(found: tuple[int, ...], shape: tuple[int, int], block_shape: tuple[int, int]) -> bool:
    rows, columns = _grid(shape, block_shape)
    return len(found) == 2 and found[0] >= rows and found[1] >= columns


def _without_padding(name: str, scales: Tensor, grid: tuple[int, int]) -> Tensor:
    """The scales of the blocks that exist. Padding repeats one value; anything else is a grid of other blocks."""
    rows, columns = grid
    padding = torch.cat([scales[rows:].flatten(), scales[:rows, columns:].flatten()])
    if padding.numel() and not (padding == padding[0]).all():
        raise InputError(
            f"{name} has shape {list(scales.shape)}, but the weight has {rows} x {columns} blocks, "
            f"and what lies beyond them is no padding"
        )
    return scales[:rows, :columns].contiguous()


def _first_of(module: str, headers: Mapping[str, TensorHeader], names: tuple[str, ...]) -> str:
    for name in names:
        if name in headers:
            return name
    raise InputError(f"{module}: no {' or '.join(names)} beside the FP8 weight; found {', '.join(sorted(headers))}")


def _linear_scales(scales: Tensor) -> Tensor:
    """float32 of any storage: exponent bytes (biased by 127), e8m0, or an ordinary float."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - 127)
    return scales.float()
