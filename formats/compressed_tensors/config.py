"""The `quantization_config` of compressed-tensors: config groups, their arguments and targets, parsed and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from aphroquant.errors import InputError
from aphroquant.formats import reading
from aphroquant.schemes import ActivationScheme, FloatScheme, IntegerScheme, LookupScheme

PACKED, INTEGER, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
MIXED = "mixed-precision"
CLASSES = ("Linear", "LinearBase")  # targets that name a kind of module rather than one module

# What an entry may hold besides the keys that are parsed: they say how the numbers were found, or repeat a default.
_IGNORED_KEYS = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype", "actorder"}
_ARGUMENT_KEYS = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"}


@dataclass(frozen=True)
class Arguments:
    """How one tensor of a module is quantized: its weight, or its input."""

    num_bits: int
    kind: Literal["int", "float"]
    strategy: str  # tensor, channel, group, block, tensor_group; for inputs tensor, token, group, tensor_group
    symmetric: bool = True
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False  # local: the scales of groups, but not the one of the tensor

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Arguments:
        unknown = config.keys() - _ARGUMENT_KEYS - _IGNORED_KEYS
        if unknown:
            raise InputError(f"quantization_config: {where} has the unknown key {sorted(unknown)[0]!r}")
        kind = reading.read_text(config, "type", default="int")
        if kind not in ("int", "float"):
            raise InputError(f"quantization_config: {where}.type {kind!r} must be 'int' or 'float'")
        local: Literal["local"] | None = "local" if config.get("dynamic") == "local" else None
        size = reading.read_integer(config, "group_size", default=-1)
        block = _block_structure(config.get("block_structure"), where)
        return cls(
            num_bits=reading.read_integer(config, "num_bits", default=8),
            kind=cast(Literal["int", "float"], kind),
            strategy=_strategy(config, where, size, block),
            symmetric=reading.read_flag(config, "symmetric", default=True),
            group_size=size if size > 0 else None,
            block_structure=block,
            dynamic=local or reading.read_flag(config, "dynamic", default=False),
        )

    def to_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "num_bits": self.num_bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "strategy": self.strategy,
        }
        if self.group_size is not None:
            config["group_size"] = self.group_size
        if self.block_structure is not None:
            config["block_structure"] = list(self.block_structure)
        if self.num_bits == 4 and self.kind == "float":
            scale_dtype = "torch.float8_e4m3fn" if self.strategy == "tensor_group" else "torch.uint8"
            config |= {"scale_dtype": scale_dtype, "zp_dtype": scale_dtype}
        return config | {"dynamic": self.dynamic}


FP4_WEIGHTS = {
    NVFP4: Arguments(4, "float", "tensor_group", group_size=16),
    MXFP4: Arguments(4, "float", "group", group_size=32),
}
NVFP4_INPUTS = Arguments(4, "float", "tensor_group", group_size=16, dynamic="local")


@dataclass(frozen=True)
class Group:
    """One config group: which modules, how their weights and inputs are quantized, and how they are stored."""

    targets: tuple[str, ...]
    weights: Arguments
    inputs: Arguments | None
    format: str

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any], default_format: str) -> Group | None:
        """None for a group that leaves weights alone (attention, KV cache).

        `output_activations` say how older files cache keys and values; the layer itself does not depend on them.
        """
        if config.get("weights") is None:
            return None
        weights = Arguments.from_config(reading.read_mapping(config, "weights"), f"{name}.weights")
        inputs = None
        if config.get("input_activations") is not None:
            where = f"{name}.input_activations"
            inputs = Arguments.from_config(reading.read_mapping(config, "input_activations"), where)
            if inputs != NVFP4_INPUTS:
                _check_inputs(inputs, where)
        stored = reading.read_text(config, "format", default=default_format)
        if stored in (MIXED, NAIVE):
            stored = storage_format(weights, inputs)
        if stored in FP4_WEIGHTS:
            _check_fp4(weights, inputs, stored, name)
        else:
            _check_weights(weights, inputs, stored, name)
        return cls(reading.read_names(config, "targets"), weights, inputs, stored)

    def to_config(self, *, with_format: bool) -> dict[str, Any]:
        config = {
            "targets": list(self.targets),
            "weights": self.weights.to_config(),
            "input_activations": self.inputs.to_config() if self.inputs else None,
            "output_activations": None,
        }
        return config | {"format": self.format} if with_format else config

    def activations(self) -> ActivationScheme | None:
        if self.inputs is None:
            return None
        strategy = "group" if self.inputs == NVFP4_INPUTS else self.inputs.strategy
        granularity = cast(Literal["tensor", "token", "group"], strategy)
        dynamic = bool(self.inputs.dynamic)
        return ActivationScheme(self.inputs.kind, self.inputs.num_bits, dynamic, granularity, self.inputs.group_size)


def storage_format(weights: Arguments, inputs: Arguments | None) -> str:
    """The format that the library chooses for these arguments."""
    if weights.kind == "float" and weights.num_bits == 4:
        return NVFP4 if weights.strategy == "tensor_group" else MXFP4
    if weights.kind == "float":
        return FLOAT
    return PACKED if inputs is None else INTEGER


def find_group(groups: tuple[Group, ...], module: str) -> Group | None:
    """The group of a module, in the library's order: exact names, regular expressions sorted, then classes."""
    by_target = {target: group for group in groups for target in group.targets}
    if module in by_target:
        return by_target[module]
    for target in sorted(by_target):
        if target.startswith("re:") and reading.matches(target.removeprefix("re:"), module):
            return by_target[target]
    for name in CLASSES:
        if name in by_target:
            return by_target[name]
    return None


def is_ignored(ignore: tuple[str, ...], module: str) -> bool:
    return any(
        reading.matches(entry.removeprefix("re:"), module) if entry.startswith("re:") else entry == module
        for entry in ignore
    )


def arguments_of(scheme: IntegerScheme | FloatScheme | LookupScheme) -> tuple[Arguments, Arguments | None]:
    """The arguments of weights and inputs that describe a scheme."""
    inputs = None
    if scheme.activations is not None:
        found = scheme.activations
        inputs = Arguments(
            found.bits, found.kind, found.granularity, group_size=found.group_size, dynamic=found.dynamic
        )
    if isinstance(scheme, LookupScheme):
        weights = FP4_WEIGHTS[NVFP4 if scheme.scales == "e4m3" else MXFP4]
        return weights, NVFP4_INPUTS if scheme.has_input_scale else inputs
    if isinstance(scheme, IntegerScheme):
        strategy = "channel" if scheme.group_size is None else "group"
        return Arguments(scheme.bits, "int", strategy, scheme.symmetric, scheme.group_size), inputs
    if scheme.block_shape is not None and scheme.block_shape[0] == 1:
        return Arguments(8, "float", "group", group_size=scheme.block_shape[1]), inputs
    return Arguments(8, "float", scheme.granularity, block_structure=scheme.block_shape), inputs


def _strategy(config: Mapping[str, Any], where: str, size: int, block: tuple[int, int] | None) -> str:
    """The strategy, told by the group size if absent, and checked against the sizes."""
    implied = "group" if size > 0 else "channel" if config.get("group_size") == -1 else "tensor"
    strategy = reading.read_text(config, "strategy", default=implied)
    sizes_fit = (strategy in ("group", "tensor_group")) == (size > 0) and (strategy == "block") == (block is not None)
    if not sizes_fit or size < -1 or size == 0:
        raise InputError(
            f"quantization_config: {where}.strategy {strategy!r} contradicts group_size = {config.get('group_size')} "
            f"and block_structure = {config.get('block_structure')}"
        )
    return strategy


def _block_structure(value: Any, where: str) -> tuple[int, int] | None:
    """[128, 128], or "128x128" in old files."""
    if value is None:
        return None
    sides = value.split("x") if isinstance(value, str) else value
    if isinstance(sides, list) and len(sides) == 2 and all(str(side).isdecimal() and int(side) > 0 for side in sides):
        return int(sides[0]), int(sides[1])
    raise InputError(f"quantization_config: {where}.block_structure = {value!r} must be two positive integers")


def _check_fp4(weights: Arguments, inputs: Arguments | None, stored: str, name: str) -> None:
    local = inputs is not None and inputs.dynamic == "local"
    if weights != FP4_WEIGHTS[stored] or (local and stored != NVFP4) or (inputs is not None and not inputs.dynamic):
        raise InputError(
            f"quantization_config: {name} ({weights.num_bits}-bit {weights.kind}, strategy {weights.strategy!r}, "
            f"group_size {weights.group_size}, and its input_activations) is not readable as {stored!r}"
        )


def _check_weights(weights: Arguments, inputs: Arguments | None, stored: str, name: str) -> None:
    readable = {PACKED: "int", INTEGER: "int", FLOAT: "float"}
    if stored not in readable:
        raise InputError(
            f"quantization_config: {name} is stored as {stored!r}, which is not readable",
            hint=f"readable are {', '.join((*readable, *FP4_WEIGHTS, NAIVE, MIXED))}",
        )
    widths = range(1, 9) if weights.kind == "int" else (8,)
    strategies = ("tensor", "channel", "group") + (("block",) if weights.kind == "float" else ())
    fits = weights.kind == readable[stored] and weights.num_bits in widths and weights.strategy in strategies
    if not fits or weights.dynamic or inputs == NVFP4_INPUTS or (weights.kind == "float" and not weights.symmetric):
        raise InputError(
            f"quantization_config: {name}.weights ({weights.num_bits}-bit {weights.kind}, "
            f"strategy {weights.strategy!r}, symmetric = {weights.symmetric}, dynamic = {weights.dynamic}) "
            f"are not readable as {stored!r}"
        )


def _check_inputs(inputs: Arguments, where: str) -> None:
    strategies = ("tensor", "token", "group") if inputs.dynamic is True else ("tensor",)
    if inputs.strategy not in strategies or not inputs.symmetric or not 1 <= inputs.num_bits <= 8:
        raise InputError(
            f"quantization_config: {where} ({inputs.num_bits}-bit, strategy {inputs.strategy!r}, "
            f"symmetric = {inputs.symmetric}, dynamic = {inputs.dynamic}) are not readable"
        )
