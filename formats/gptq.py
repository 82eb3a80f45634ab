"""GPTQ: 2, 3, 4 or 8-bit integers, groups along the input, bit streams packed along the input.

    P.qweight int32 [K*b/32, N]        P.qzeros int32 [ceil(K/G), N*b/32]
    P.scales float16 [ceil(K/G), N]    P.g_idx int32 [K]: the group of each input column; absent means k // G

Two versions differ in the zero points: v1 (`"checkpoint_format": "gptq"`) stores (zero - 1) mod 2**b in each field, v2
(`"gptq_v2"`) the zero point itself. The label is not reliable, but a symmetric checkpoint has the constant zero point
2**(b-1), so that its words tell the version; only an asymmetric one is read by its label. GPTQModel (named in `meta`)
makes v1 of 2, 4 and 8 bits by subtracting from whole words: a zero point of 0 takes another one from the next field.

Written by default: v1 for symmetric schemes, which every reader knows and whose constant never wraps; v2 as soon as a
module is asymmetric. v1 would store a zero point of 0 as 2**b - 1, and kernels that add 1 without masking take that for
2**b; GPTQModel (and transformers through it) refuses asymmetric v1 files of other tools, while v2 is read by GPTQModel,
transformers, vLLM and SGLang. Which zero points occur is not known before the last module is quantized, so
the schemes decide and not the numbers. `for_schemes(..., checkpoint_format="gptq")` forces v1 for older readers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from aphroquant import __version__
from aphroquant.errors import InputError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.formats.packing import WORD_BITS, num_words, pack, unpack
from aphroquant.formats.patterns import exactly
from aphroquant.schemes import IntegerScheme, QuantizedWeight, Scheme

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"


class Settings(NamedTuple):
    """What `quantization_config` says about one module."""

    bits: int
    group_size: int | None
    symmetric: bool
    desc_act: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], base: Settings | None = None) -> Settings:
        """Settings at the top level, or, with `base`, one entry of `dynamic` that overrides some of them."""
        bits = reading.read_integer(config, "bits", "w_bit", default=base.bits if base else None)
        if bits not in BITS:
            widths = ", ".join(map(str, BITS))
            raise InputError(f"quantization_config: GPTQ with bits = {bits} is not readable; {widths} are")
        group_default = None if base is None else base.group_size or -1
        return cls(
            bits=bits,
            group_size=reading.read_group_size(config, "group_size", "q_group_size", default=group_default),
            symmetric=reading.read_flag(config, "sym", default=base.symmetric if base else True),
            desc_act=reading.read_flag(config, "desc_act", default=base.desc_act if base else False),
        )

    @classmethod
    def of(cls, scheme: IntegerScheme) -> Settings:
        return cls(scheme.bits, scheme.group_size, scheme.symmetric, scheme.act_order)

    def to_config(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group_size": -1 if self.group_size is None else self.group_size,
            "desc_act": self.desc_act,
            "sym": self.symmetric,
        }


@dataclass(frozen=True)
class Gptq(Format):
    """GPTQ checkpoints. `dynamic` maps "+:regex" (or "regex") to overriding keys and "-:regex" to "not quantized".

    The first pattern that matches from the start of a module's name decides.
    """

    name: ClassVar[str] = "gptq"
    quant_method: ClassVar[str] = "gptq"
    tensor_names: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    settings: Settings
    checkpoint_format: str
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lm_head: bool = False
    static_groups: bool = False
    by_gptqmodel: bool = False  # who wrote it, which matters for v1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        checkpoint_format = reading.read_text(config, "checkpoint_format", "format", default=V1)
        if checkpoint_format not in (V1, V2) or config.get("is_marlin_format"):
            found = "marlin" if config.get("is_marlin_format") else checkpoint_format
            raise InputError(f"quantization_config: GPTQ checkpoint_format {found!r} is not readable; {V1}, {V2} are")
        word = reading.read_text(config, "pack_dtype", default="int32")
        if word != "int32":
            raise InputError(f"quantization_config: GPTQ with pack_dtype {word!r} is not readable; int32 is")
        settings = Settings.from_config(config)
        dynamic = {}
        for pattern in reading.read_mapping(config, "dynamic"):
            dynamic[pattern] = reading.read_mapping(reading.read_mapping(config, "dynamic"), pattern)
            Settings.from_config(dynamic[pattern], settings)  # a bad entry is an error even if it matches no module
        meta = reading.read_mapping(config, "meta")
        return cls(
            settings=settings,
            checkpoint_format=checkpoint_format,
            dynamic=dynamic,
            lm_head=reading.read_flag(config, "lm_head", default=False),
            static_groups=reading.read_flag({**meta, **config}, "static_groups", default=False),
            by_gptqmodel=_is_by_gptqmodel(meta),
        )

    @classmethod
    def for_schemes(
        cls,
        schemes: Mapping[str, Scheme],
        dense_modules: list[str],
        *,
        checkpoint_format: Literal["auto", "gptq", "gptq_v2"] = "auto",
    ) -> Self:
        held = {
            module: Settings.of(writing.weight_only_integer("gptq", module, scheme, BITS))
            for module, scheme in writing.quantized(schemes).items()
        }
        settings = Counter(held.values()).most_common(1)[0][0] if held else Settings(4, 128, True, False)
        skipped = [module for module in writing.left_dense(schemes, dense_modules) if _in_block(module)]
        dynamic: dict[str, Mapping[str, Any]] = {f"-:{pattern}": {} for pattern in exactly(skipped, held)}
        for other in dict.fromkeys(held.values()):
            own = [module for module in held if held[module] == other]
            rest = [*skipped, *(module for module in held if held[module] != other)]
            if other != settings:
                dynamic |= {f"+:{pattern}": other.to_config() for pattern in exactly(own, rest)}
        automatic = V1 if all(own.symmetric for own in held.values()) else V2
        version = automatic if checkpoint_format == "auto" else checkpoint_format
        return cls(settings, version, dynamic, lm_head=writing.LM_HEAD in held)

    def quantization_config(self) -> dict[str, Any]:
        config = {
            "quant_method": "gptq",
            **self.settings.to_config(),
            "lm_head": self.lm_head,
            "static_groups": self.static_groups,
            "pack_dtype": "int32",
            "checkpoint_format": self.checkpoint_format,
            "meta": {"quantizer": [f"aphroquant:{__version__}"]},
        }
        if self.dynamic:
            config["dynamic"] = {pattern: dict(keys) for pattern, keys in self.dynamic.items()}
        return config

    def side_files(self) -> dict[str, Any]:
        """AutoGPTQ and optimum look for the settings here only. AutoGPTQ takes every file for version 1."""
        return {"quantize_config.json": self.quantization_config()} if self.checkpoint_format == V1 else {}

    def settings_of(self, module: str) -> Settings | None:
        """The settings of one module; None if the config leaves it dense."""
        for pattern, keys in self.dynamic.items():
            if pattern.startswith("-:"):
                if reading.matches(pattern.removeprefix("-:"), module):
                    return None
            elif reading.matches(pattern.removeprefix("+:"), module):
                return Settings.from_config(keys, self.settings)
        return self.settings

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        if "qweight" not in headers:
            return None
        settings = self.settings_of(module)
        if settings is None:
            raise InputError(f"{module} has a qweight, although quantization_config.dynamic leaves it dense")
        bits, group_size, symmetric, desc_act = settings
        words, out_features = reading.require_matrix(module, headers, "qweight", (torch.int32,))
        if words * WORD_BITS % bits:
            raise InputError(f"{module}.qweight has {words} rows, which are no whole number of {bits}-bit codes")
        in_features = words * WORD_BITS // bits
        groups = 1 if group_size is None else math.ceil(in_features / group_size)
        reading.require_shape(module, headers, "scales", reading.SCALE_DTYPES, (groups, out_features))
        zero_words = num_words(out_features, bits)
        reading.require_shape(module, headers, "qzeros", (torch.int32,), (groups, zero_words))
        if "g_idx" in headers:
            reading.require_shape(module, headers, "g_idx", (torch.int32, torch.int64), (in_features,))
        act_order = desc_act and not self.static_groups and groups > 1
        if act_order and "g_idx" not in headers:
            raise InputError(
                f"{module} has no g_idx, although quantization_config says that there is an activation order",
                hint='with "desc_act": false it is read without one',
            )
        return IntegerScheme(bits, group_size, symmetric, act_order=act_order)

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        scheme = self.scheme(module, reading.headers_of(tensors))
        assert isinstance(scheme, IntegerScheme)
        in_features = tensors["qweight"].shape[0] * WORD_BITS // scheme.bits
        out_features = tensors["qweight"].shape[1]
        canonical = {
            "codes": unpack(tensors["qweight"], scheme.bits, in_features, dim=0).T.contiguous(),  # [K, N] -> [N, K]
            "scales": tensors["scales"].T.contiguous(),  # [G, N] -> [N, G]
        }
        stored = unpack(tensors["qzeros"], scheme.bits, out_features, dim=1).T.contiguous()
        if scheme.symmetric:
            _require_constant(module, stored, scheme.bits)
        elif self.checkpoint_format == V2:
            canonical["zeros"] = stored
        elif self.by_gptqmodel and WORD_BITS % scheme.bits == 0:
            words = tensors["qzeros"] + _one_in_each_field(scheme.bits)  # overflow wraps, as it did when they were made
            canonical["zeros"] = unpack(words, scheme.bits, out_features, dim=1).T.contiguous()
        else:
            canonical["zeros"] = _true_zeros(stored, scheme.bits)
        if "g_idx" in tensors:
            index = _group_index(module, tensors["g_idx"], canonical["scales"].shape[1], scheme)
            if scheme.act_order:
                canonical["group_index"] = index
        return QuantizedWeight(scheme, canonical, (out_features, in_features))

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        settings = self.settings_of(module)
        assert settings is not None
        bits, group_size, symmetric, act_order = settings
        writing.checked(module, weight, IntegerScheme(bits, group_size, symmetric, act_order=act_order))
        out_features, in_features = weight.shape
        whole_words = WORD_BITS // math.gcd(WORD_BITS, bits)
        writing.require_multiple("gptq", module, "out_features", out_features, whole_words)
        writing.require_multiple("gptq", module, "in_features", in_features, whole_words)
        writing.require_multiple("gptq", module, "in_features", in_features, group_size or 1)
        scales = writing.exact_cast("gptq", module, "scales", weight["scales"], torch.float16)
        constant = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
        zeros = constant if symmetric else weight["zeros"]
        stored = _stored_zeros(zeros, bits) if self.checkpoint_format == V1 else zeros
        return {
            "qweight": pack(weight["codes"].T, bits, dim=0),
            "qzeros": pack(stored.T, bits, dim=1),
            "scales": scales.T.contiguous(),
            "g_idx": weight.group_index().to(torch.int32),
        }


def _true_zeros(stored: Tensor, bits: int) -> Tensor:
    """v1 fields to zero points: one more, per field, and 2**bits is 0."""
    return stored.add(1).bitwise_and(2**bits - 1)  # 8 bits: uint8 wraps by itself


def _stored_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points to v1 fields. Inverse of `_true_zeros`."""
    return zeros.sub(1).bitwise_and(2**bits - 1)


def _one_in_each_field(bits: int) -> int:
    """A word of ones, for widths that divide it."""
    return sum(1 << shift for shift in range(0, WORD_BITS, bits))


def _is_by_gptqmodel(meta: Mapping[str, Any]) -> bool:
    """`meta` names the programs that quantized, with their versions."""
    programs = meta.get("quantizer") or []
    names = [programs] if isinstance(programs, str) else programs if isinstance(programs, list) else []
    return any(str(name).lower().startswith("gptqmodel") for name in names)


def _require_constant(module: str, stored: Tensor, bits: int) -> None:
    """A symmetric checkpoint has one of two constants in all fields: that of v2, or one less for v1."""
    middle = 2 ** (bits - 1)
    if not ((stored == middle).all() or (stored == middle - 1).all()):
        raise InputError(
            f"{module}.qzeros are not the constant of a symmetric {bits}-bit checkpoint ({middle - 1} in v1, {middle} "
            f"in v2), although quantization_config says sym = true",
            hint='with "sym": false they are read as they are, by checkpoint_format',
        )


def _group_index(module: str, index: Tensor, groups: int, scheme: IntegerScheme) -> Tensor:
    """g_idx as int32, in range, and sequential unless the config announces an activation order."""
    outside = (index < 0) | (index >= groups)
    if outside.any():
        column = int(outside.nonzero()[0])
        raise InputError(f"{module}.g_idx[{column}] = {int(index[column])} is not among the {groups} groups of scales")
    sequential = torch.arange(index.shape[0]) // (scheme.group_size or index.shape[0])
    if not scheme.act_order and not torch.equal(index.long(), sequential):
        column = int((index.long() != sequential).nonzero()[0])
        raise InputError(
            f"{module}.g_idx[{column}] = {int(index[column])} is an activation order, although quantization_config "
            f"says that there is none (desc_act = false, or static_groups = true)",
            hint='"desc_act": true and "static_groups": false let it be read as stored',
        )
    return index.to(torch.int32)


def _in_block(module: str) -> bool:
    """Whether it is part of a numbered block: readers look for quantized layers only there (and at lm_head)."""
    return any(part.isdigit() for part in module.split("."))
