"""NVIDIA ModelOpt: FP8, and NVFP4 with or without quantized inputs, also mixed in one checkpoint.

    NVFP4:  P.weight uint8 [N, K/2], the first of two codes in the low nibble    P.weight_scale float8_e4m3fn [N, K/16]
            P.weight_scale_2 float32 []    P.input_scale float32 [], unless inputs are left alone
    FP8:    P.weight float8_e4m3fn [N, K]    P.weight_scale float32 [], or [N] with inputs quantized per token
            P.input_scale float32 [], with inputs quantized by it

All scales are multiplied with: W = code * weight_scale * weight_scale_2, the two scales first. `config.json` has the
settings, and older files have them in `hf_quant_config.json` only; both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import fp4, reading, writing
from aphroquant.formats.base import CacheScheme, Format, TensorHeader
from aphroquant.schemes import ActivationScheme, FloatScheme, LookupScheme, QuantizedWeight, Scheme

LAYOUT_VERSION = "0.47.0"  # the release of the library whose layout is written
FP8, FP4 = torch.float8_e4m3fn, torch.uint8
BLOCK = 16
FP4_INPUTS = ActivationScheme("float", 4, granularity="group", group_size=BLOCK)
STATIC_INPUTS = ActivationScheme("float", dynamic=False, granularity="tensor")
ALGORITHMS: Mapping[Scheme, str] = {
    FloatScheme("tensor", activations=STATIC_INPUTS): "FP8",
    FloatScheme("tensor"): "FP8",
    FloatScheme("channel", activations=ActivationScheme("float")): "FP8_PER_CHANNEL_PER_TOKEN",
    LookupScheme("e2m1", BLOCK, "e4m3", activations=FP4_INPUTS): "NVFP4",
    LookupScheme("e2m1", BLOCK, "e4m3"): "W4A16_NVFP4",
}
NAMES = tuple(dict.fromkeys(ALGORITHMS.values()))
MIXED = "MIXED_PRECISION"
SETTINGS_FILE = "hf_quant_config.json"
_CACHES: Mapping[str, dict[str, Any]] = {
    "FP8": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
    "INT8": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True},
}
_ALGORITHM = "quant_algo"  # in a cache's scheme: the name that this format has for it
_TENSORS = frozenset({"weight", "weight_scale", "weight_scale_2", "input_scale"})


@dataclass(frozen=True)
class ModelOpt(Format):
    """ModelOpt checkpoints of one algorithm, or of several (`layers`: module, or what it is part of -> algorithm)."""

    name: ClassVar[str] = "modelopt"
    quant_method: ClassVar[str] = "modelopt"
    tensor_names: ClassVar[frozenset[str]] = _TENSORS

    algorithm: str
    layers: Mapping[str, str]
    ignore: tuple[str, ...] = ()
    kv_cache_algorithm: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        settings = reading.read_mapping(config, "quantization") if "quantization" in config else config
        algorithm = _algorithm(settings.get("quant_algo"), "quant_algo", (*NAMES, MIXED))
        size = reading.read_integer(settings, "group_size", default=BLOCK)
        if size != BLOCK and "FP4" in algorithm:
            raise InputError(f"quantization_config: group_size = {size} is not that of NVFP4, {BLOCK}")
        layers = {}
        for module, entry in reading.read_mapping(settings, "quantized_layers").items():
            where = f"quantized_layers.{module}"
            if not isinstance(entry, Mapping):
                raise InputError(f"quantization_config: {where} = {entry!r} must be an object")
            layers[module] = _algorithm(entry.get("quant_algo"), f"{where}.quant_algo", NAMES)
        names = reading.read_names(settings, "ignore", "exclude_modules")
        return cls(algorithm, layers, names, _cache_algorithm(settings))

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        layers = {module: _held(module, scheme) for module, scheme in writing.quantized(schemes).items()}
        used = set(layers.values())
        ignored = tuple(writing.left_dense_with_head(schemes, dense_modules))
        return cls(MIXED, layers, ignored) if len(used) > 1 else cls(next(iter(used), "NVFP4"), {}, ignored)

    def quantization_config(self) -> dict[str, Any]:
        targets: dict[str, list[str]] = {}
        for module, algorithm in self.layers.items():
            targets.setdefault(algorithm, []).append(module)
        if self.algorithm != MIXED:
            targets = {self.algorithm: ["Linear"]}
        groups = [_group(algorithm) | {"targets": names} for algorithm, names in targets.items() if _group(algorithm)]
        config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": self.algorithm, "ignore": list(self.ignore)}
        if groups:
            config["config_groups"] = {f"group_{number}": group for number, group in enumerate(groups)}
        if self.algorithm == MIXED:
            config["quantized_layers"] = self._quantized_layers()
        if self.kv_cache_algorithm == "FP8":
            config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        return config | {"producer": {"name": "modelopt", "version": LAYOUT_VERSION}}

    def side_files(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"quant_algo": self.algorithm, "kv_cache_quant_algo": self.kv_cache_algorithm}
        if self.algorithm == MIXED:
            settings["quantized_layers"] = self._quantized_layers()
        elif "FP4" in self.algorithm:
            settings["group_size"] = BLOCK
        settings["exclude_modules"] = list(self.ignore)
        producer = {"name": "modelopt", "version": LAYOUT_VERSION}
        return {SETTINGS_FILE: {"producer": producer, "quantization": settings}}

    def cache_scheme(self) -> CacheScheme | None:
        if self.kv_cache_algorithm is None:
            return None
        return _CACHES.get(self.kv_cache_algorithm, {}) | {_ALGORITHM: self.kv_cache_algorithm}

    def with_cache_scheme(self, scheme: CacheScheme) -> Self:
        numbers = scheme.get("num_bits"), scheme.get("type")
        fitting = (name for name, cache in _CACHES.items() if (cache["num_bits"], cache["type"]) == numbers)
        return replace(self, kv_cache_algorithm=scheme.get(_ALGORITHM) or next(fitting, None))

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        dtype = headers["weight"].dtype if "weight" in headers else None
        for name, header in headers.items():
            if header.dtype in (FP8, FP4) and name not in _TENSORS:
                raise InputError(f"{module}.{name} is quantized in a way that is not readable")
        if dtype not in (FP8, FP4):
            return None
        if "pre_quant_scale" in headers or "svdquant_lora_a" in headers:
            raise InputError(
                f"{module} scales its input by pre_quant_scale (AWQ or SVDQuant), which is not readable",
                hint="export the model with the scales folded into the layers before",
            )
        scheme = self._announced(module, dtype, has_input_scale="input_scale" in headers)
        if isinstance(scheme, FloatScheme):
            _require_fp8(module, scheme, headers)
        else:
            shape = fp4.require_packed(module, headers, "weight")
            fp4.require_block_scales(module, headers, "weight_scale", (FP8,), shape, BLOCK)
            fp4.require_number(module, headers, "weight_scale_2")
        if scheme.activations is not None and (scheme.activations.bits == 4 or not scheme.activations.dynamic):
            fp4.require_number(module, headers, "input_scale")
        return scheme

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        scheme = self.scheme(module, reading.headers_of(tensors))
        if isinstance(scheme, LookupScheme):
            return _read_fp4(module, scheme, tensors)
        assert isinstance(scheme, FloatScheme)
        codes, scales = tensors["weight"], tensors["weight_scale"].float()
        canonical = {"codes": codes, "scales": scales.reshape(() if scheme.granularity == "tensor" else (-1, 1))}
        if scheme.activations == STATIC_INPUTS:
            canonical["input_scale"] = tensors["input_scale"].float().reshape(())
        return QuantizedWeight(scheme, canonical, (codes.shape[0], codes.shape[1]))

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        algorithm = self.layers.get(module) if self.algorithm == MIXED else self.algorithm
        if _held(module, weight.scheme) != algorithm:
            raise UsageError(f"{module}: a weight of scheme {weight.scheme} was not announced for this module")
        writing.checked(module, weight, weight.scheme)
        if isinstance(weight.scheme, LookupScheme):
            return _write_fp4(module, weight)
        scales = writing.exact_cast("modelopt", module, "scales", weight["scales"], torch.float32)
        tensors = {"weight": weight["codes"].contiguous(), "weight_scale": scales.reshape(scales.shape[:1])}
        if "input_scale" in weight.tensors:
            tensors["input_scale"] = weight["input_scale"].to(torch.float32).reshape(())
        return tensors

    def _quantized_layers(self) -> dict[str, dict[str, Any]]:
        sizes: dict[str, dict[str, Any]] = {name: {"group_size": BLOCK} for name in NAMES if "FP4" in name}
        return {
            module: {"quant_algo": algorithm} | sizes.get(algorithm, {}) for module, algorithm in self.layers.items()
        }

    def _announced(self, module: str, dtype: torch.dtype, *, has_input_scale: bool) -> FloatScheme | LookupScheme:
        """The scheme of a module with codes of `dtype`. Its algorithm may stand under a part of its name."""
        parents = [module]
        while "." in parents[-1]:
            parents.append(parents[-1].rpartition(".")[0])
        algorithm = next((self.layers[parent] for parent in parents if parent in self.layers), self.algorithm)
        if algorithm == MIXED:
            algorithm = "FP8" if dtype == FP8 else "NVFP4"
        scheme = _scheme(algorithm, has_input_scale=has_input_scale)
        if isinstance(scheme, FloatScheme) != (dtype == FP8):
            raise InputError(f"{module}.weight is {dtype}, although quantization_config says {algorithm}")
        return scheme


def _cache_algorithm(settings: Mapping[str, Any]) -> str | None:
    """Under its own name, or as a description of the numbers, which config.json has."""
    named = settings.get("kv_cache_quant_algo")
    if named is not None:
        return reading.read_text(settings, "kv_cache_quant_algo", default="").upper()
    described = reading.read_mapping(settings, "kv_cache_scheme")
    return "FP8" if (described.get("num_bits"), described.get("type")) == (8, "float") else None


def _algorithm(value: Any, where: str, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value.upper() not in known:
        raise InputError(f"quantization_config: {where} = {value!r} is not readable; {', '.join(known)} are")
    return value.upper()


def _scheme(algorithm: str, *, has_input_scale: bool) -> FloatScheme | LookupScheme:
    """What an algorithm means. Inputs that should have a scale and have none are left alone."""
    match algorithm:
        case "FP8":
            return FloatScheme("tensor", activations=STATIC_INPUTS if has_input_scale else None)
        case "FP8_PER_CHANNEL_PER_TOKEN":
            return FloatScheme("channel", activations=ActivationScheme("float"))
        case _:
            inputs = FP4_INPUTS if has_input_scale and algorithm == "NVFP4" else None
            return LookupScheme("e2m1", BLOCK, "e4m3", activations=inputs)


def _held(module: str, scheme: Scheme) -> str:
    """The algorithm that holds a scheme."""
    if scheme in ALGORITHMS:
        return ALGORITHMS[scheme]
    raise UsageError(
        f"{module}: modelopt holds FP8 (one scale and static inputs, or a scale a row and inputs per token) and NVFP4, "
        f"not {scheme}",
        hint="compressed-tensors holds more kinds of FP8; or " + writing.REQUANTIZE,
    )


def _group(algorithm: str) -> dict[str, Any]:
    """Weights and inputs as `config_groups` describe them; nothing for what the library does not describe there."""
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return {}
    numbers: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if algorithm != "FP8":
        numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    return {"weights": numbers} if algorithm == "W4A16_NVFP4" else {"input_activations": numbers, "weights": numbers}


def _require_fp8(module: str, scheme: FloatScheme, headers: Mapping[str, TensorHeader]) -> None:
    out_features, _ = reading.require_matrix(module, headers, "weight", (FP8,))
    if scheme.granularity == "tensor":
        fp4.require_number(module, headers, "weight_scale")
        return
    found = reading.require(module, headers, "weight_scale", reading.SCALE_DTYPES).shape
    if found not in ((out_features,), (out_features, 1)):
        raise InputError(f"{module}.weight_scale has shape {list(found)}, but must be [{out_features}]")


def _read_fp4(module: str, scheme: LookupScheme, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    codes = fp4.unpack_nibbles(tensors["weight"])
    canonical = {
        "codes": codes,
        "scales": tensors["weight_scale"],
        "global_scale": fp4.factor(module, "weight_scale_2", tensors["weight_scale_2"]),
    }
    if scheme.has_input_scale:
        canonical["input_scale"] = fp4.factor(module, "input_scale", tensors["input_scale"])
    return QuantizedWeight(scheme, canonical, (codes.shape[0], codes.shape[1]))


def _write_fp4(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Global scales of other formats may be reciprocals of a float32, and are rounded; see `fp4`."""
    writing.require_multiple("modelopt", module, "in_features", weight.shape[1], BLOCK)
    tensors = {
        "weight": fp4.pack_nibbles(weight["codes"]),
        "weight_scale": weight["scales"].contiguous(),
        "weight_scale_2": fp4.stored_factor("modelopt", module, "global_scale", weight["global_scale"]),
    }
    if "input_scale" in weight.tensors:
        tensors["input_scale"] = fp4.stored_factor("modelopt", module, "input_scale", weight["input_scale"])
    return tensors
