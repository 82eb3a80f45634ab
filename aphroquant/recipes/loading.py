"""From YAML to a recipe. Whatever is wrong is an InputError that names the file, the line and the key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from aphroquant.errors import AphroquantError, InputError, UsageError
from aphroquant.recipes.models import Recipe

SHIPPED = Path(str(files("aphroquant.recipes").joinpath("shipped")))
SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 2**20
MAX_NODES = 20_000  # aliases count each time they are used: a few can stand for any number of nodes
_KeyPath = tuple[str | int, ...]


class LoadedRecipe(NamedTuple):
    """A recipe and where it came from. Paths in it are relative to `directory` (None: to the working directory)."""

    recipe: Recipe
    name: str
    text: str
    directory: Path | None


def read_recipe(given: str | Path) -> LoadedRecipe:
    """A recipe's file, or one that ships with aphroquant by its name."""
    path = Path(given).expanduser()
    is_name = str(given) in shipped_names()
    if is_name and not path.is_file():
        path = SHIPPED / f"{given}.yaml"
    elif not path.exists():
        near = difflib.get_close_matches(str(given), shipped_names(), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"{given}: no such file, and no recipe of that name", hint=f"{hint}aphroquant recipe list shows those"
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: is larger than {MAX_BYTES:,} bytes, which no recipe is")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    directory = None if path.parent == SHIPPED else path.parent
    return LoadedRecipe(load_recipe(text, str(path)), path.stem, text, directory)


def load_recipe(text: str, where: str = "recipe") -> Recipe:
    """The recipe that a text is. `where` is what errors call it."""
    node = _composed(text, where)
    lines = _lines(node, where)
    data = _constructed(text, where)
    if not isinstance(data, dict):
        raise InputError(f"{where}: a recipe is a mapping of keys, not {_kind(data)}", hint=_start())
    try:
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise _told(error, lines, where) from error


def shipped_names() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML as JSON knows it: "no" and "2024-01-01" are words, 1e-3 is a number, and no key is given twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  of PyYAML's own form

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def _float(loader: _Loader, node: Any) -> float:
    return float(node.value)


def _int(loader: _Loader, node: Any) -> int:
    if len(node.value) > 100:
        raise yaml.constructor.ConstructorError(None, None, "a number is too long", node.start_mark)
    return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def _composed(text: str, where: str) -> Any:
    try:
        return yaml.compose(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise _not_yaml(error, where) from error
    except RecursionError as error:
        raise InputError(f"{where}: is nested too deeply") from error


def _constructed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise _not_yaml(error, where) from error


def _not_yaml(error: Exception, where: str) -> InputError:
    mark = getattr(error, "problem_mark", None)
    place = where if mark is None else f"{where}, line {mark.line + 1}"
    return InputError(f"{place}: {getattr(error, 'problem', None) or error}", hint=_start())


def _lines(node: Any, where: str) -> dict[_KeyPath, int]:
    """The line of every key and item. InputError for a document of more nodes than any recipe has."""
    lines: dict[_KeyPath, int] = {}
    waiting: list[tuple[_KeyPath, Any]] = [((), node)]
    while waiting:
        path, current = waiting.pop()
        if len(lines) + len(waiting) > MAX_NODES or len(path) > 100:
            raise InputError(f"{where}: has more than {MAX_NODES:,} values, or is nested too deeply")
        for step, line, child in _children(current):
            lines.setdefault((*path, step), line)
            waiting.append(((*path, step), child))
    return lines


def _children(node: Any) -> Iterator[tuple[str | int, int, Any]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield index, item.start_mark.line + 1, item


def _told(error: ValidationError, lines: Mapping[_KeyPath, int], where: str) -> AphroquantError:
    """The first thing that is wrong, and how many others are."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] == "missing")  # a misspelt key is missing as well
    path = _key_path(first)
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 1)
    message, hint = _message(first, path)
    others = len({_key_path(problem) for problem in problems}) - 1
    more = f" (and {others} more)" if others else ""
    return InputError(f"{where}, line {line}: {message}{more}", hint=hint)


def _message(problem: ErrorDetails, path: _KeyPath) -> tuple[str, str | None]:
    key, kind = shown_path(path), problem["type"]
    if kind == "extra_forbidden":
        known = _keys_of(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        listed = f"the keys here are {', '.join(known)}"
        return f"unknown key {key!r}", f"Did you mean {near[0]!r}? {listed}" if near else listed
    if kind == "missing":
        return f"{key} is missing", None
    said = problem["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    value = problem["input"]
    if isinstance(value, str | int | float | bool) and kind != "value_error":
        return f"{key} = {json.dumps(value, ensure_ascii=False)}: {said}", None
    return (f"{key}: {said}" if path else said), None


def _key_path(problem: ErrorDetails) -> _KeyPath:
    """Where it is, without the names of types that pydantic adds where there may be several."""
    path, types = tuple(problem["loc"]), ("int", "float", "str", "constrained-str")
    return path[:-1] if path and path[-1] in types and problem["type"] != "extra_forbidden" else path


def shown_path(path: Sequence[str | int]) -> str:
    """outputs.awq.rules[0].bits"""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def _keys_of(path: Sequence[str | int]) -> list[str]:
    """The keys that may stand at a place in a recipe."""
    model: type[BaseModel] | None = Recipe
    for step in path:
        if model is None:
            break
        if isinstance(step, int) or step not in _fields(model):
            continue  # an item of a list, or a name that the user chose
        model = _model_in(_fields(model)[step])
    return [] if model is None else list(_fields(model))


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a type is, or that its items or values are."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _kind(data: object) -> str:
    return "empty" if data is None else f"a {type(data).__name__}"


def _start() -> str:
    return "aphroquant recipe init writes one to start from"


def require_source(recipe: Recipe, name: str) -> str:
    """UsageError if neither the recipe nor the command names a source."""
    if recipe.source is None:
        raise UsageError(f"the recipe {name} names no source", hint="give --source, or write it into the recipe")
    return recipe.source
