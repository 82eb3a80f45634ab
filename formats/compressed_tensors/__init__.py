"""compressed-tensors: pack-, int-, float-, nvfp4- and mxfp4-quantized weights, also mixed in one checkpoint.

The layouts stand in `packed`, `plain` and `float4`, what the config says about them in `config`. Not read: MXFP6 and
MXFP8, sparsity, and online transforms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import CacheScheme, Format, TensorHeader
from aphroquant.formats.compressed_tensors import float4, packed, plain
from aphroquant.formats.compressed_tensors.config import (
    FP4_WEIGHTS,
    INTEGER,
    MIXED,
    PACKED,
    Group,
    arguments_of,
    find_group,
    is_ignored,
    storage_format,
)
from aphroquant.schemes import FloatScheme, IntegerScheme, LookupScheme, QuantizedWeight, Scheme

LAYOUT_VERSION = "0.20.0"  # the release of the library whose layout is written
DENSE_SINCE = (0, 18)
Held = IntegerScheme | FloatScheme | LookupScheme
_WEIGHT_TENSORS = ("weight", *(f"weight_{name}" for name in ("packed", "scale", "shape", "zero_point", "g_idx")))
_TENSORS = (*_WEIGHT_TENSORS, "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale")


@dataclass(frozen=True)
class CompressedTensors(Format):
    """compressed-tensors checkpoints. One scheme is written with the target "Linear", several with lists of modules.

    Lists, since an engine that fuses q, k and v looks for a name before it looks for a class, and would find the wrong
    group for the fused module if the commonest scheme had the class.
    """

    name: ClassVar[str] = "compressed-tensors"
    quant_method: ClassVar[str] = "compressed-tensors"
    tensor_names: ClassVar[frozenset[str]] = frozenset(_TENSORS)

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    version: str = LAYOUT_VERSION
    kv_cache_scheme: CacheScheme | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        for key in ("sparsity_config", "transform_config"):
            found = reading.read_mapping(config, key)
            if found and found.get("format") != "dense":
                raise InputError(f"quantization_config: {key} is not readable")
        default_format = reading.read_text(config, "format", default=MIXED)
        groups = []
        for name, group in reading.read_mapping(config, "config_groups").items():
            if not isinstance(group, Mapping):
                raise InputError(f"quantization_config: the group {name!r} is {group!r}, but must be an object")
            parsed = Group.from_config(name, group, default_format)
            if parsed is not None:
                groups.append(parsed)
        version = reading.read_text(config, "version", default=LAYOUT_VERSION)
        cache = reading.read_mapping(config, "kv_cache_scheme") or None
        return cls(tuple(groups), reading.read_names(config, "ignore"), version, cache)

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        modules: dict[Held, list[str]] = {}
        for module, scheme in writing.quantized(schemes).items():
            modules.setdefault(_held(module, scheme), []).append(module)
        groups = []
        for held, names in modules.items():
            weights, inputs = arguments_of(held)
            targets = tuple(names) if len(modules) > 1 else ("Linear",)
            groups.append(Group(targets, weights, inputs, storage_format(weights, inputs)))
        return cls(tuple(groups), tuple(writing.left_dense_with_head(schemes, dense_modules)))

    def quantization_config(self) -> dict[str, Any]:
        formats = list(dict.fromkeys(group.format for group in self.groups))
        mixed = len(formats) > 1
        return {
            "quant_method": "compressed-tensors",
            "version": self.version,
            "format": MIXED if mixed else formats[0] if formats else PACKED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": list(self.ignore),
            "kv_cache_scheme": None if self.kv_cache_scheme is None else dict(self.kv_cache_scheme),
            "config_groups": {
                f"group_{number}": group.to_config(with_format=mixed) for number, group in enumerate(self.groups)
            },
        }

    def cache_scheme(self) -> CacheScheme | None:
        return self.kv_cache_scheme

    def with_cache_scheme(self, scheme: CacheScheme) -> Self:
        return replace(self, kv_cache_scheme=scheme) if "num_bits" in scheme else self

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        group = self._group(module, headers)
        if group is None:
            return None
        if group.format == PACKED:
            return packed.scheme(module, group, headers)
        if group.format == INTEGER:
            return plain.integer_scheme(module, group, headers)
        if group.format in FP4_WEIGHTS:
            return float4.scheme(module, group, headers)
        return plain.float_scheme(module, group, headers)

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        headers = reading.headers_of(tensors)
        group = self._group(module, headers)
        assert group is not None
        if group.format == PACKED:
            return packed.read(module, group, tensors, prefer_padded=self._before_dense_packing())
        if group.format == INTEGER:
            return plain.read_integer(module, group, tensors)
        if group.format in FP4_WEIGHTS:
            return float4.read(module, group, tensors, float4.scheme(module, group, headers))
        return plain.read_float(module, group, tensors)

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        scheme = _held(module, weight.scheme)
        writing.checked(module, weight, scheme)
        group = find_group(self.groups, module)
        arguments = arguments_of(scheme)
        if group is None or (group.weights, group.inputs) != arguments or is_ignored(self.ignore, module):
            raise UsageError(f"{module}: a weight of scheme {scheme} was not announced for this module")
        if isinstance(scheme, LookupScheme):
            return float4.write(module, weight)
        if weight["scales"].dtype not in reading.SCALE_DTYPES:
            raise UsageError(f"{module}: scales are {weight['scales'].dtype}, but must be float16, bfloat16 or float32")
        if group.format == PACKED:
            return packed.write(module, weight)
        return plain.write_integer(module, weight) if group.format == INTEGER else plain.write_float(module, weight)

    def _group(self, module: str, headers: Mapping[str, TensorHeader]) -> Group | None:
        """The group of a module that holds quantized tensors; None for a dense one."""
        stored = [name for name in ("weight_packed", "weight_scale") if name in headers]
        if not stored:
            return None
        group = None if is_ignored(self.ignore, module) else find_group(self.groups, module)
        if group is None:
            raise InputError(
                f"{module} has a {stored[0]}, although quantization_config says that it is not quantized "
                f"(ignore, or the targets of no group)"
            )
        return group

    def _before_dense_packing(self) -> bool:
        numbers = re.match(r"(\d+)\.(\d+)", self.version)
        return numbers is not None and (int(numbers[1]), int(numbers[2])) < DENSE_SINCE


def _held(module: str, scheme: Scheme) -> Held:
    """The scheme, if compressed-tensors holds it."""
    if isinstance(scheme, LookupScheme) and float4.holds(scheme):
        return scheme
    if not isinstance(scheme, IntegerScheme | FloatScheme):
        raise UsageError(f"{module}: compressed-tensors cannot hold {scheme}", hint=writing.REQUANTIZE)
    if isinstance(scheme, FloatScheme):
        return scheme
    if scheme.has_offsets:
        raise UsageError(
            f"{module}: compressed-tensors holds integer zero points, not real-valued offsets", hint=writing.REQUANTIZE
        )
    if scheme.act_order:
        raise UsageError(
            f"{module}: compressed-tensors has dropped the activation order (group index), which {scheme} needs",
            hint="write gptq, which has it; or " + writing.REQUANTIZE,
        )
    return scheme
