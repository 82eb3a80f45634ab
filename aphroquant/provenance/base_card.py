"""The source's own README.md: its Hub metadata, as far as a quantized model inherits it, and its text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from aphroquant.checkpoint.files import read_small
from aphroquant.errors import InputError

# What stays true of a quantized model. Not the source's results, nor the data that it was trained on.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "tags")
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MAX_VALUES = 200
_MAX_VALUE_LEN = 200

Value = str | list[str]


@dataclass(frozen=True)
class BaseCard:
    """`metadata` has keys of INHERITED only; `text` is everything after the metadata."""

    metadata: dict[str, Value] = field(default_factory=dict)
    text: str = ""


def read_base_card(directory: Path) -> BaseCard:
    """The README.md of a checkpoint's directory; an empty card if there is none, or none that can be read."""
    path = directory / "README.md"
    if not path.is_file():
        return BaseCard()
    try:
        content = read_small(path).decode("utf-8", errors="replace")
    except InputError:  # a card is no part of the model: nothing fails for it
        return BaseCard()
    return parse_card(content)


def parse_card(content: str) -> BaseCard:
    """A card from its text. What the metadata holds beside words and lists of words is left out."""
    match = _FRONT_MATTER.match(content)
    if match is None:
        return BaseCard(text=content.strip())
    try:
        found = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that is none is a ValueError
        found = None
    entries = found if isinstance(found, dict) else {}
    metadata = {key: value for key in INHERITED if (value := _plain(entries.get(key))) is not None}
    return BaseCard(metadata, content[match.end() :].strip())


def _plain(value: object) -> Value | None:
    """A word or a list of words; YAML reads the language `no` as False."""
    if isinstance(value, list):
        words = [word for item in value[:_MAX_VALUES] if isinstance(word := _plain(item), str)]
        return words or None
    if value is False:
        return "no"
    if isinstance(value, str) and value.strip() and value.isprintable() and len(value) <= _MAX_VALUE_LEN:
        return value
    return None
