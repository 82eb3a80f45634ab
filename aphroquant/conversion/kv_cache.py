"""Scales of a quantized KV cache on their way to the target: under its names, and with its config saying so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from aphroquant.calibration.inputs import fp8_scale
from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.base import is_kv_scale, naming, read_json
from aphroquant.conversion.calibration_block import CacheMaxima
from aphroquant.conversion.request import ConversionRequest
from aphroquant.errors import UsageError
from aphroquant.formats.base import CacheScheme, Format
from aphroquant.formats.kv_scales import SPELLINGS, scale_name, written_name
from aphroquant.formats.modelopt import SETTINGS_FILE
from aphroquant.models.spec import DecoderSpec, K

# What scales without a description are for: all formats that store them have them for FP8 caches.
FP8_PER_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
_PROJECTIONS = (".k_proj", ".q_proj", ".qkv_proj")
_BOTH: tuple[Literal["k", "v"], ...] = ("k", "v")
_HOLDERS = ("compressed-tensors", "modelopt", "fp8")
_SCALARS = ("modelopt",)  # whose readers want a scale of no dimension; others want one


def written_names(checkpoint: Checkpoint, names: Sequence[str], target: str) -> dict[str, tuple[str, ...]]:
    """Under which names each of the stored tensors `names` is written: its own, but for the cache's scales.

    One scale for both keys and values becomes two. None remain of a tensor that another spelling makes superfluous.
    """
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    for attention in _attentions(checkpoint):
        stored = {which: scale_name(attention, checkpoint.tensors, which) for which in _BOTH}
        used: dict[str, list[str]] = {}
        for which, name in stored.items():
            if name is not None:
                used.setdefault(name, []).append(written_name(attention, which, target))
        for which in _BOTH:
            spelled = (f"{attention}.{spelling.format(x=which)}" for spelling in SPELLINGS)
            found |= dict.fromkeys((name for name in spelled if name in found), ())
        found |= {name: tuple(targets) for name, targets in used.items() if name in found}
    return found


def in_targets_shape(name: str, shape: tuple[int, ...], target: str) -> tuple[int, ...]:
    """For a scale of one number as many dimensions as the target's readers expect; other shapes as they are."""
    if not is_kv_scale(name) or math.prod(shape) != 1:
        return shape
    return () if target in _SCALARS else (1,)


def with_cache_scheme(target: Format, checkpoint: Checkpoint) -> Format:
    """The target, announcing the cache's scales: as the source describes them, if all are stored or the target is of
    the same format; without a description as FP8, if all are stored."""
    described = _description(checkpoint)
    if described is not None and target.name != checkpoint.format_name:
        described = {key: value for key, value in described.items() if key in FP8_PER_TENSOR}
    complete = _has_all_scales(checkpoint)
    if described is not None and (complete or target.name == checkpoint.format_name):
        return target.with_cache_scheme(described)
    return target.with_cache_scheme(FP8_PER_TENSOR) if complete else target


def check_kv_scales_asked(request: ConversionRequest) -> None:
    """UsageError if scales of the cache are asked for that the target has no place for, or without calibration."""
    if not request.kv_scales:
        return
    if request.to not in _HOLDERS:
        raise UsageError(
            f"--kv-scales: readers of {request.to} look for no scales of a KV cache",
            hint=f"{', '.join(_HOLDERS)} have a place for them",
        )
    if request.samples == 0:
        raise UsageError("--kv-scales needs calibration, but samples = 0", hint="give --samples a number")


def check_kv_scales(checkpoint: Checkpoint, request: ConversionRequest) -> None:
    """UsageError if scales of the cache are asked for and cannot be found or stored."""
    check_kv_scales_asked(request)
    stored = next((name for name in checkpoint.tensors if is_kv_scale(name)), None)
    if request.kv_scales and stored is not None:
        raise UsageError(
            f"--kv-scales: {checkpoint.source} has scales of its own, {stored} among them",
            hint="leave --kv-scales out: they are carried over",
        )


def new_scales(spec: DecoderSpec, target: str) -> dict[str, str]:
    """The cache's scales of every layer: the first of their spellings, and the one that the target's readers know."""
    attention = K.rpartition(".")[0]
    prefixes = [f"{spec.block_prefix(layer)}.{attention}" for layer in range(spec.num_layers)]
    return {
        written_name(prefix, which, ""): written_name(prefix, which, target) for prefix in prefixes for which in _BOTH
    }


def found_scales(prefix: str, maxima: CacheMaxima) -> dict[str, Tensor]:
    """The scales, float32 [1], of the block with this prefix: what its greatest key and value were become 448."""
    attention = f"{prefix}.{K.rpartition('.')[0]}"
    found = zip(_BOTH, (maxima.key, maxima.value), strict=True)
    return {written_name(attention, which, ""): fp8_scale(largest).reshape(1).cpu() for which, largest in found}


def _description(checkpoint: Checkpoint) -> CacheScheme | None:
    if checkpoint.format is None:
        return None
    found = checkpoint.format.cache_scheme()
    settings = checkpoint.directory / SETTINGS_FILE  # has more than config.json
    if found is None and checkpoint.format_name == "modelopt" and settings.exists():
        stored: Any = read_json(settings)
        with naming(checkpoint.path):
            return type(checkpoint.format).from_config(stored).cache_scheme()
    return found


def _attentions(checkpoint: Checkpoint) -> list[str]:
    modules = [module for module in checkpoint.schemes() if module.endswith(_PROJECTIONS)]
    return list(dict.fromkeys(module.rpartition(".")[0] for module in modules))


def _has_all_scales(checkpoint: Checkpoint) -> bool:
    attentions = _attentions(checkpoint)
    names = [scale_name(attention, checkpoint.tensors, which) for attention in attentions for which in _BOTH]
    return bool(names) and None not in names
