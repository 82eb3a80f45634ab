"""MXFP4 as gpt-oss stores it: the experts of a layer stacked, blocks of 32 four-bit floats under a power of two.

    P.experts.X_blocks uint8 [E, N, K/32, 16]    two codes a byte, the first of them in the low nibble
    P.experts.X_scales uint8 [E, N, K/32]        exponents, biased by 127

for X = gate_up_proj and down_proj. Expert e is the module P.experts.e.X with the weight [N, K]; rows of gate and up
alternate as stored. The biases, stacked too, are no part of the weights and stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import Format, Part, Place, TensorHeader
from aphroquant.formats.fp4 import exponent_scales, pack_nibbles, unpack_nibbles
from aphroquant.schemes import LookupScheme, QuantizedWeight, Scheme

MXFP4 = LookupScheme("e2m1", 32, "e8m0")
BLOCK = 32
MAX_EXPERTS = 2**16  # each is a module; a file that claims more is no model
_STACK = re.compile(r"(.+\.experts)\.(\w+_proj)_(blocks|scales)")
_EXPERT = re.compile(r"(.+\.experts)\.(0|[1-9]\d*)\.(\w+_proj)")


@dataclass(frozen=True)
class Mxfp4(Format):
    """gpt-oss checkpoints: only stacks of experts are quantized."""

    name: ClassVar[str] = "mxfp4"
    quant_method: ClassVar[str] = "mxfp4"
    tensor_names: ClassVar[frozenset[str]] = frozenset({"blocks", "scales"})

    modules_to_not_convert: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(reading.read_names(config, "modules_to_not_convert"))

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        stacks: dict[str, set[int]] = {}
        for module, scheme in writing.quantized(schemes).items():
            if scheme != MXFP4:
                raise UsageError(f"{module}: mxfp4 holds {MXFP4}, not {scheme}", hint=writing.REQUANTIZE)
            stack, expert = _stack_of(module)
            stacks.setdefault(stack, set()).add(expert)
        for stack, experts in stacks.items():
            missing = set(range(max(experts) + 1)) - experts
            if missing:
                raise UsageError(f"mxfp4 stacks all experts, but expert {min(missing)} of {stack} is not quantized")
        return cls(tuple(writing.left_dense_with_head(schemes, dense_modules)))

    def quantization_config(self) -> dict[str, Any]:
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(self.modules_to_not_convert)}

    def locate(self, name: str, header: TensorHeader) -> list[Part]:
        found = _STACK.fullmatch(name)
        if found is None:
            return super().locate(name, header)
        stack, projection, suffix = found.groups()
        if len(header.shape) != (4 if suffix == "blocks" else 3) or not 0 < header.shape[0] <= MAX_EXPERTS:
            expected = f"[experts, rows, blocks{', 16' if suffix == 'blocks' else ''}]"
            raise InputError(f"{name} has shape {list(header.shape)}, but must be {expected}")
        return [Part(f"{stack}.{expert}.{projection}", suffix, expert) for expert in range(header.shape[0])]

    def place(self, module: str, suffix: str) -> Place:
        found = _EXPERT.fullmatch(module)
        if found is None:
            return super().place(module, suffix)
        return Place(f"{found[1]}.{found[3]}_{suffix}", int(found[2]))

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        if _EXPERT.fullmatch(module) is None or not {"blocks", "scales"} & headers.keys():
            return None
        found = reading.require(module, headers, "blocks", (torch.uint8,)).shape
        if len(found) != 3 or 0 in found or found[2] != BLOCK // 2:
            raise InputError(f"{module}: blocks are {list(found)} for each expert, but must be [rows, blocks, 16]")
        reading.require_shape(module, headers, "scales", (torch.uint8,), found[:2])
        return MXFP4

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        assert self.scheme(module, reading.headers_of(tensors)) is not None
        codes = unpack_nibbles(tensors["blocks"]).flatten(1)  # [N, K/32, 16] -> [N, K]
        canonical = {"codes": codes, "scales": exponent_scales(tensors["scales"])}
        return QuantizedWeight(MXFP4, canonical, (codes.shape[0], codes.shape[1]))

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The entries of one expert; `place` says where they go."""
        writing.checked(module, weight, MXFP4)
        out_features, in_features = weight.shape
        writing.require_multiple("mxfp4", module, "in_features", in_features, BLOCK)
        blocks = weight["codes"].reshape(out_features, in_features // BLOCK, BLOCK)
        return {"blocks": pack_nibbles(blocks), "scales": weight["scales"].contiguous().view(torch.uint8)}


def _stack_of(module: str) -> tuple[str, int]:
    """The stack that an expert's weight belongs to, and its number."""
    found = _EXPERT.fullmatch(module)
    if found is None:
        raise UsageError(
            f"{module}: mxfp4 holds experts of gpt-oss (....experts.0.down_proj), nothing else",
            hint="write compressed-tensors, which holds MXFP4 weights of any module",
        )
    return f"{found[1]}.{found[3]}", int(found[2])
