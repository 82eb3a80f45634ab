"""The source's own card: README.md, or what a GGUF file says of itself, as far as a quantized model inherits it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.files import read_small
from aphroquant.checkpoint.gguf import GgufCheckpoint
from aphroquant.errors import InputError

# What stays true of a quantized model. Not the source's results, nor the data that it was trained on.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "tags")
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MAX_VALUES = 200
_MAX_VALUE_LEN = 200

# Keys of a GGUF file, and what they are in a card.
_GGUF_KEYS = {
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
    "general.languages": "language",
    "general.tags": "tags",
}
_GGUF_ORIGINS = ("general.base_model.0.repo_url", "general.source.repo_url", "general.repo_url")
_HUB_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?", re.ASCII)

Value = str | list[str]


@dataclass(frozen=True)
class BaseCard:
    """`metadata` has keys of INHERITED only; `text` is everything after the metadata. `origin` is the Hub id that a
    GGUF file names as what it was made from."""

    metadata: dict[str, Value] = field(default_factory=dict)
    text: str = ""
    origin: str | None = None


def read_base_card(checkpoint: Checkpoint) -> BaseCard:
    """The card of a checkpoint; an empty one if there is none, or none that can be read."""
    if isinstance(checkpoint, GgufCheckpoint):
        return _gguf_card(checkpoint.metadata)
    path = checkpoint.directory / "README.md"
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


def _gguf_card(stored: Mapping[str, Any]) -> BaseCard:
    metadata = {name: value for key, name in _GGUF_KEYS.items() if (value := _plain(stored.get(key))) is not None}
    urls = (_HUB_URL.fullmatch(str(stored.get(key))) for key in _GGUF_ORIGINS)
    return BaseCard(metadata, origin=next((match[1] for match in urls if match), None))


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
