"""Results as plain values for JSON, and back: every result class has to_dict and from_dict through these two.

JSON has no infinity and no NaN: a figure that is not finite becomes null, and a null where a number must be becomes
infinity again. Keys that a class does not have are left out, so that a record may say more than this version knows.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from aphroquant.errors import InputError

Result = TypeVar("Result")


def to_plain(value: Any) -> Any:
    """Dictionaries, lists, texts and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(cls: type[Result], data: Any, where: str = "result") -> Result:
    """An instance of a dataclass. InputError naming what is missing or of a wrong type."""
    restored: Result = _restore(cls, data, where)
    return restored


def _restore(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _restore_fields(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _restore(kinds[0], value, where)
    if origin is tuple:
        return _restore_tuple(arguments, _checked(value, list, where), where)
    if origin is dict:
        entries = _checked(value, dict, where).items()
        return {str(key): _restore(arguments[1], item, f"{where}.{key}") for key, item in entries}
    if hint is float:
        return math.inf if value is None else float(_checked(value, int | float, where))
    return value if hint is Any else _checked(value, hint, where)


def _restore_fields(cls: type[Any], value: Any, where: str) -> Any:
    record, hints = _checked(value, dict, where), typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        if field.name in record:
            found[field.name] = _restore(hints[field.name], record[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}.{field.name} is missing")
    return cls(**found)


def _restore_tuple(arguments: tuple[Any, ...], items: list[Any], where: str) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_restore(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if len(items) != len(arguments):
        raise InputError(f"{where} has {len(items)} entries, not {len(arguments)}")
    return tuple(
        _restore(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(arguments, items, strict=True))
    )


def _checked(value: Any, kind: Any, where: str) -> Any:
    numbers = isinstance(value, bool) and kind is not bool
    if not isinstance(value, kind) or numbers:
        name = getattr(kind, "__name__", str(kind))
        raise InputError(f"{where} = {value!r} must be of type {name}")
    return value
