"""bitsandbytes: four-bit NF4 and FP4 with scales of flat blocks, and LLM.int8 with a scale a row.

4 bits: P.weight uint8 [ceil(N*K/2), 1], the first of two codes in the high nibble (or the same bytes seen as a float)
        P.weight.absmax float32 [blocks]    P.weight.quant_map float32 [16], the table
        P.weight.quant_state.bitsandbytes__nf4 (or __fp4) uint8 [n]: a JSON object with the shape, the block size, ...
        scales that are themselves quantized: P.weight.absmax uint8 [blocks], P.weight.nested_absmax float32
        [ceil(blocks/256)], P.weight.nested_quant_map float32 [256], and nested_offset in the JSON
8 bits: P.weight int8 [N, K]    P.SCB float32 [N], the largest magnitude of each row    P.weight_format uint8 [], 0

W = quant_map[code] * absmax[element // blocksize], elements counted over the flattened weight, or W = code * SCB / 127.
The kernels of the library take the table from its name, so a file with any other table is refused. What LLM.int8 does
with outliers happens at run time and leaves no trace in a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import Format, Part, TensorHeader
from aphroquant.formats.bitsandbytes import four_bit, int8
from aphroquant.schemes import IntegerScheme, LookupScheme, QuantizedWeight, Scheme

_PARTS = re.compile(r"(.+)\.(weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))")
_COMPUTE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class BitsAndBytes(Format):
    """bitsandbytes checkpoints, all of four bits and one kind, or all of LLM.int8."""

    name: ClassVar[str] = "bitsandbytes"
    quant_method: ClassVar[str] = "bitsandbytes"
    tensor_names: ClassVar[frozenset[str]] = frozenset({"weight", "SCB", "weight_format"})

    bits: Literal[4, 8]
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = False
    compute_dtype: str = "bfloat16"  # of the products
    weight_dtype: str = "bfloat16"  # of a dequantized weight
    skip_modules: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        in_4bit, in_8bit = (
            reading.read_flag(config, f"load_in_{bits}bit", default=config.get(f"_load_in_{bits}bit") is True)
            for bits in (4, 8)
        )
        if in_4bit == in_8bit:
            raise InputError("quantization_config: one of load_in_4bit and load_in_8bit must be true")
        quant_type = reading.read_text(config, "bnb_4bit_quant_type", default="fp4")
        if in_4bit and quant_type not in ("nf4", "fp4"):
            raise InputError(f"quantization_config: bnb_4bit_quant_type {quant_type!r} is not readable; nf4, fp4 are")
        return cls(
            bits=4 if in_4bit else 8,
            quant_type="nf4" if quant_type == "nf4" else "fp4",
            double_quant=reading.read_flag(config, "bnb_4bit_use_double_quant", default=False),
            compute_dtype=reading.read_text(config, "bnb_4bit_compute_dtype", default="float32"),
            skip_modules=reading.read_names(config, "llm_int8_skip_modules"),
        )

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        held = {module: _held(module, scheme) for module, scheme in writing.quantized(schemes).items()}
        writing.same_for_all("bitsandbytes", "scheme", held)
        scheme = next(iter(held.values()), LookupScheme("nf4", 64, "float", flattened=True))
        skipped = writing.left_dense_with_head(schemes, dense_modules)
        _refuse_ambiguous_skips(list(held), skipped)
        if isinstance(scheme, IntegerScheme):
            return cls(8, skip_modules=tuple(skipped))
        table = cast(Literal["nf4", "fp4"], scheme.table)
        return cls(4, table, scheme.scales == "nested", skip_modules=tuple(skipped))

    def for_model(self, dtype: torch.dtype, source: Format | None) -> Self:
        """The library dequantizes to the model's dtype, and computes in it, or in what a source of this format says."""
        name = str(dtype).removeprefix("torch.")
        said = source.compute_dtype.removeprefix("torch.") if isinstance(source, BitsAndBytes) else name
        return replace(self, compute_dtype=said if said in _COMPUTE_DTYPES else name, weight_dtype=name)

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": self.bits == 4,
            "_load_in_8bit": self.bits == 8,
            "load_in_4bit": self.bits == 4,
            "load_in_8bit": self.bits == 8,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": self.compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": list(self.skip_modules),  # null would be "all but the head" to transformers
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }

    def locate(self, name: str, header: TensorHeader) -> list[Part]:
        found = _PARTS.fullmatch(name)
        if found is not None:
            return [Part(found[1], found[2])]
        if ".quant_state.bitsandbytes__" in name:
            raise InputError(f"{name} belongs to no layer's weight; quantized stacks of experts are not readable")
        return super().locate(name, header)

    def knows(self, suffix: str) -> bool:
        return suffix in self.tensor_names or suffix.startswith("weight.")

    def scales_in(self, suffix: str, tensor: Tensor) -> Tensor | None:
        return int8.row_scales(tensor) if suffix == "SCB" else None

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        if any(name.startswith(four_bit.STATE) for name in headers):
            return four_bit.scheme(module, headers)
        if "weight.absmax" in headers:
            raise InputError(f"{module}: the tensor {four_bit.STATE}nf4 (or fp4) is missing beside weight.absmax")
        if "weight" not in headers or headers["weight"].dtype.is_floating_point:
            return None
        if headers["weight"].dtype == torch.uint8:
            raise InputError(
                f"{module}: the tensors weight.absmax and {four_bit.STATE}nf4 are missing beside the packed weight"
            )
        return int8.scheme(module, headers)

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        scheme = self.scheme(module, reading.headers_of(tensors))
        return four_bit.read(module, tensors) if isinstance(scheme, LookupScheme) else int8.read(module, tensors)

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        scheme = _held(module, weight.scheme)
        writing.checked(module, weight, scheme)
        if isinstance(scheme, LookupScheme):
            return four_bit.write(module, weight, self.weight_dtype)
        return int8.write(module, weight)


def _held(module: str, scheme: Scheme) -> LookupScheme | IntegerScheme:
    """The scheme, if bitsandbytes holds it."""
    if isinstance(scheme, IntegerScheme) and scheme == int8.INT8:
        return scheme
    if not isinstance(scheme, LookupScheme) or scheme.table not in ("nf4", "fp4") or scheme.activations is not None:
        raise UsageError(
            f"{module}: bitsandbytes holds nf4, fp4 and int8 with one scale a row, not {scheme}",
            hint=writing.REQUANTIZE,
        )
    sizes = four_bit.BLOCK_SIZES
    if not scheme.flattened or scheme.scales not in ("float", "nested") or scheme.block_size not in sizes:
        raise UsageError(
            f"{module}: bitsandbytes has float scales for flat blocks of {sizes[0]} to {sizes[-1]}, not {scheme}",
            hint=writing.REQUANTIZE,
        )
    return scheme


def _refuse_ambiguous_skips(modules: list[str], skipped: list[str]) -> None:
    """transformers skips whatever begins or ends with a name in `llm_int8_skip_modules`."""
    for dense in skipped:
        for module in modules:
            if module.startswith(dense) or module.endswith(dense):
                raise UsageError(
                    f"bitsandbytes cannot leave {dense} dense and quantize {module}: its readers skip names that begin "
                    f"or end with one of llm_int8_skip_modules",
                    hint="write gptq or compressed-tensors, or leave both dense",
                )
