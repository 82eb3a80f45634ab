"""What every reader checks: keys of `quantization_config` and headers of tensors. All raise InputError."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import regex  # type: ignore[import-untyped]
import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.formats.base import TensorHeader

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MATCH_SECONDS = 0.25
MAX_PATTERN = 2000  # characters
MAX_SHOWN = 120


def headers_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorHeader]:
    return {name: TensorHeader(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def read_integer(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The value of the first of `names` (synonyms) that the config has."""
    name, value = _find(config, names, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"quantization_config: {name} = {value!r} must be an integer")
    return value


def read_flag(config: Mapping[str, Any], name: str, *, default: bool) -> bool:
    name, value = _find(config, (name,), default)
    if not isinstance(value, bool):
        raise InputError(f"quantization_config: {name} = {value!r} must be true or false")
    return value


def read_text(config: Mapping[str, Any], *names: str, default: str) -> str:
    """In lower case: the field writes "GEMM" and "gemm" alike."""
    name, value = _find(config, names, default)
    if not isinstance(value, str):
        raise InputError(f"quantization_config: {name} = {value!r} must be a string")
    return value.lower()


def read_names(config: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """A list of strings; null and absent are the empty list."""
    name, value = _find(config, names, ())
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise InputError(f"quantization_config: {name} = {value!r} must be a list of strings")
    return tuple(value)


def read_mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object; null and absent are the empty one."""
    name, value = _find(config, (name,), {})
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"quantization_config: {name} = {value!r} must be an object")
    return value


def read_group_size(config: Mapping[str, Any], *names: str, default: int | None = None) -> int | None:
    """A positive group size, or None for -1: one group a row."""
    size = read_integer(config, *names, default=default)
    if size != -1 and size < 1:
        raise InputError(f"quantization_config: {names[0]} = {size} must be positive, or -1 for one group a row")
    return None if size == -1 else size


def matches(pattern: str, module: str) -> bool:
    """Whether the regular expression matches from the start of the module's name, as the field's readers do it.

    A pattern is part of a file, and some take ages by design: InputError for one that does.
    """
    compiled = _compiled(pattern)
    try:
        return compiled.match(module, timeout=MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise InputError(
            f"quantization_config: {pattern[:MAX_SHOWN]!r} takes more than {MATCH_SECONDS:g} seconds to match {module}",
            hint="write the pattern without repetitions inside repetitions",
        ) from error


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    """For the engine that can be stopped; `re`, which the field's readers use, says what is an expression."""
    if len(pattern) > MAX_PATTERN:
        raise InputError(
            f"quantization_config: {pattern[:MAX_SHOWN]!r} has {len(pattern)} characters, at most {MAX_PATTERN}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that later versions may read otherwise
            re.compile(pattern)
            return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"quantization_config: {pattern[:MAX_SHOWN]!r} is not a regular expression: {error}"
        ) from error


def require(module: str, headers: Mapping[str, TensorHeader], name: str, dtypes: Iterable[torch.dtype]) -> TensorHeader:
    """The header of a tensor that must be there, in one of `dtypes`."""
    if name not in headers:
        raise InputError(f"{module}: the tensor {name} is missing; found {', '.join(sorted(headers))}")
    allowed = tuple(dtypes)
    if headers[name].dtype not in allowed:
        expected = " or ".join(_short(dtype) for dtype in allowed)
        raise InputError(f"{module}.{name} has dtype {_short(headers[name].dtype)}, but must be {expected}")
    return headers[name]


def require_matrix(
    module: str, headers: Mapping[str, TensorHeader], name: str, dtypes: Iterable[torch.dtype]
) -> tuple[int, int]:
    """The shape of a two-dimensional, non-empty tensor."""
    shape = require(module, headers, name, dtypes).shape
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{module}.{name} has shape {list(shape)}, but must be a matrix")
    return shape[0], shape[1]


def require_shape(
    module: str, headers: Mapping[str, TensorHeader], name: str, dtypes: Iterable[torch.dtype], shape: tuple[int, ...]
) -> None:
    found = require(module, headers, name, dtypes).shape
    if found != shape:
        raise InputError(
            f"{module}.{name} has shape {list(found)}, but the other tensors and quantization_config need {list(shape)}"
        )


def _find(config: Mapping[str, Any], names: tuple[str, ...], default: Any) -> tuple[str, Any]:
    for name in names:
        if config.get(name) is not None:
            return name, config[name]
    if default is None:
        raise InputError(f"quantization_config has no {' or '.join(names)}")
    return names[0], default


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
