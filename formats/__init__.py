"""Checkpoint formats: bytes on disk <-> schemes. One format a module; no format knows a solver or a kernel, nor another
format (but for auto-round, which is an envelope around two)."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from aphroquant.errors import InputError, UsageError

if TYPE_CHECKING:
    from aphroquant.formats.base import Format

__all__ = ["FORMATS", "detect_format", "format_class"]


def _lazy(module: str, name: str) -> Callable[[], type[Format]]:
    """Import a format when it is first asked for: listing the names must not wait for torch."""

    def load() -> type[Format]:
        loaded: type[Format] = getattr(importlib.import_module(f"aphroquant.formats.{module}"), name)
        return loaded

    return load


FORMATS: Mapping[str, Callable[[], type[Format]]] = {
    "aqlm": _lazy("aqlm", "Aqlm"),
    "auto-round": _lazy("autoround", "AutoRound"),
    "awq": _lazy("awq", "Awq"),
    "bitsandbytes": _lazy("bitsandbytes", "BitsAndBytes"),
    "compressed-tensors": _lazy("compressed_tensors", "CompressedTensors"),
    "exl3": _lazy("exl3", "Exl3"),
    "fp8": _lazy("fp8", "Fp8"),
    "gptq": _lazy("gptq", "Gptq"),
    "hqq": _lazy("hqq", "Hqq"),
    "modelopt": _lazy("modelopt", "ModelOpt"),
    "mxfp4": _lazy("mxfp4", "Mxfp4"),
}  # each name is also the format's quant_method
_OLDER_METHODS = {"intel/auto-round": "auto-round"}


def format_class(name: str) -> type[Format]:
    """The format of that name, as on the command line."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        known = f"the formats are {', '.join(FORMATS)}"
        raise UsageError(f"unknown format {name!r}", hint=f"Did you mean {near[0]!r}? {known}" if near else known)
    return FORMATS[name]()


def detect_format(quantization_config: Mapping[str, Any]) -> type[Format]:
    """The format that a checkpoint's `quantization_config` describes, by its quant_method, else by its keys.

    Old AWQ and GPTQ files (quant_config.json, quantize_config.json) have no quant_method.
    """
    method = quantization_config.get("quant_method")
    if method is None:
        method = _method_of_keys(quantization_config)
    if isinstance(method, str):
        method = _OLDER_METHODS.get(method, method)
    if not isinstance(method, str) or method not in FORMATS:
        raise InputError(
            f"quantization_config: quant_method {method!r} is not readable", hint=f"readable are {', '.join(FORMATS)}"
        )
    return FORMATS[method]()


def _method_of_keys(config: Mapping[str, Any]) -> str | None:
    if {"w_bit", "q_group_size", "zero_point"} & config.keys():
        return "awq"
    if "config_groups" in config:
        return "compressed-tensors"
    if "bits" in config and {"desc_act", "sym", "checkpoint_format"} & config.keys():
        return "gptq"
    return None
