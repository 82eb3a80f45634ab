"""AutoRound: the tensors of GPTQ or AWQ, with settings for single modules, under a `packing_format`.

    auto_round:auto_gptq                 GPTQ's bit streams with GPTQ v1's zero points (one less)
    auto_round, auto_round:gptqmodel     GPTQ's bit streams with the zero points themselves
    auto_round:auto_awq                  AWQ gemm's interleaved nibbles

`extra_config` maps modules, or regular expressions over their names, to settings that differ; 16 bits mean dense.
Written: the first for symmetric schemes, the third for asymmetric ones of 4 bits, else the second, which fewer engines
know. The label is not always right, but symmetric zero points tell GPTQ's versions apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import reading, writing
from aphroquant.formats.awq import Awq
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.formats.gptq import BITS, Gptq
from aphroquant.schemes import QuantizedWeight, Scheme

GPTQ_V1, GPTQ_V2, AWQ = "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq"
PACKINGS = {
    GPTQ_V1: GPTQ_V1,
    "auto_round:gptq": GPTQ_V1,
    GPTQ_V2: GPTQ_V2,
    "auto_round": GPTQ_V2,
    AWQ: AWQ,
    "auto_round:awq": AWQ,
}
DENSE_BITS = 16
LAYOUT_VERSION = "0.16.1"  # the release of the library whose layout is written
_SPECIAL = frozenset("*+?^$()[]{}|\\")  # a name with one of these is a regular expression


class Settings(NamedTuple):
    """What the config says about one module."""

    bits: int
    group_size: int | None
    symmetric: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], base: Settings | None = None) -> Settings | None:
        """Settings at the top, or, with `base`, an entry of `extra_config`; None for a module that stays dense."""
        bits = reading.read_integer(config, "bits", default=base.bits if base else None)
        if bits >= DENSE_BITS:
            return None
        inputs = reading.read_integer(config, "act_bits", default=DENSE_BITS)
        kind = reading.read_text(config, "data_type", default="int")
        if inputs < DENSE_BITS or kind != "int":
            raise InputError(
                f"quantization_config: AutoRound with data_type {kind!r} and act_bits = {inputs} is not readable; "
                f"integers with inputs left alone are"
            )
        size = reading.read_group_size(config, "group_size", default=base.group_size or -1 if base else None)
        return cls(bits, size, reading.read_flag(config, "sym", default=base.symmetric if base else True))

    def to_config(self) -> dict[str, Any]:
        size = -1 if self.group_size is None else self.group_size
        return {"bits": self.bits, "group_size": size, "sym": self.symmetric, "data_type": "int"}


@dataclass(frozen=True)
class AutoRound(Format):
    """AutoRound checkpoints. `extra_config` has the modules (or patterns) with settings of their own; None is dense."""

    name: ClassVar[str] = "auto-round"
    quant_method: ClassVar[str] = "auto-round"
    tensor_names: ClassVar[frozenset[str]] = Gptq.tensor_names | Awq.tensor_names

    settings: Settings
    packing_format: str
    extra_config: Mapping[str, Settings | None] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        packing = reading.read_text(config, "packing_format", "backend", default="auto_round:auto_gptq")
        if packing not in PACKINGS:
            known = ", ".join(PACKINGS)
            raise InputError(f"quantization_config: packing_format {packing!r} is not readable; {known} are")
        settings = Settings.from_config(config)
        if settings is None:
            raise InputError(f"quantization_config: bits = {config.get('bits')} leave every module dense")
        extra = reading.read_mapping(config, "extra_config")
        own = {name: Settings.from_config(reading.read_mapping(extra, name), settings) for name in extra}
        format = cls(settings, packing, own)
        for entry in (settings, *own.values()):
            format._packed(entry or settings)  # bad settings are an error even if they match no module
        return format

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        held = {module: _held(module, scheme) for module, scheme in writing.quantized(schemes).items()}
        settings = Counter(held.values()).most_common(1)[0][0] if held else Settings(4, 128, True)
        extra: dict[str, Settings | None] = dict.fromkeys(writing.left_dense(schemes, dense_modules))
        extra |= {module: own for module, own in held.items() if own != settings or not _in_block(module)}
        if all(own.symmetric for own in held.values()):
            packing = GPTQ_V1
        else:
            packing = AWQ if {own.bits for own in held.values()} == {4} else GPTQ_V2
        return cls(settings, packing, extra)

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "auto-round",
            "packing_format": self.packing_format,
            **self.settings.to_config(),
            "autoround_version": LAYOUT_VERSION,
            "extra_config": {
                name: own.to_config() if own else {"bits": DENSE_BITS} for name, own in self.extra_config.items()
            },
        }

    def settings_of(self, module: str) -> Settings | None:
        """The settings of one module; None if the config leaves it dense."""
        if module in self.extra_config:
            return self.extra_config[module]
        for pattern, own in self.extra_config.items():
            if _SPECIAL & set(pattern) and reading.matches(f".*(?:{pattern})", module):
                return own
        return self.settings

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        if "qweight" not in headers:
            return None
        return self._format_of(module).scheme(module, headers)

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        return self._format_of(module).read(module, tensors)

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        tensors = self._format_of(module).write(module, weight)
        if PACKINGS[self.packing_format] == GPTQ_V1:
            del tensors["g_idx"]  # sequential, and unknown to the readers of this layout
        return tensors

    def _format_of(self, module: str) -> Format:
        settings = self.settings_of(module)
        if settings is None:
            raise InputError(f"{module} has a qweight, although quantization_config.extra_config leaves it dense")
        return self._packed(settings)

    def _packed(self, settings: Settings) -> Format:
        """The format that has the same tensors."""
        config = settings.to_config()
        if PACKINGS[self.packing_format] == AWQ:
            return Awq.from_config(config | {"zero_point": not settings.symmetric, "version": "gemm"})
        version = "gptq" if PACKINGS[self.packing_format] == GPTQ_V1 else "gptq_v2"
        return Gptq.from_config(config | {"desc_act": False, "checkpoint_format": version})


def _held(module: str, scheme: Scheme) -> Settings:
    """The settings that describe a scheme, if it can be held."""
    held = writing.weight_only_integer("auto-round", module, scheme, BITS)
    if held.act_order:
        raise UsageError(
            f"{module}: auto-round has no activation order (group index), which {scheme} needs",
            hint="write gptq, which has; or " + writing.REQUANTIZE,
        )
    return Settings(held.bits, held.group_size, held.symmetric)


def _in_block(module: str) -> bool:
    """Whether it is part of a numbered block: readers take others for dense unless they are named."""
    return any(part.isdigit() for part in module.split("."))
