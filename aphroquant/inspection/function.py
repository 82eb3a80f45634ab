"""What besides the weights decides a model's function: sizes, rotary positions, quantized inputs, tokens, templates."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aphroquant.checkpoint import Checkpoint
from aphroquant.errors import InputError
from aphroquant.models.spec import DecoderSpec, RopeSpec
from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, LookupScheme, Scheme

Kind = Literal["config", "inputs", "tokenizer", "file"]

# Keys of config.json that say how it was made, or what a loader should do, and change no logit.
_IRRELEVANT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "quantization_config",
        "pretraining_tp",
        "tie_word_embeddings",  # what it does is compared as weights
    }
)
_SAMPLE_CHARACTERS = 20_000


class Change(NamedTuple):
    """Something that differs. `changes_function` is False for what only limits or describes the model."""

    kind: Kind
    name: str
    ours: str
    theirs: str
    changes_function: bool


def config_changes(ours: Checkpoint, theirs: Checkpoint) -> Iterator[Change]:
    """What the two configurations make of the same weights."""
    try:
        specs = ours.spec, theirs.spec
    except InputError:
        yield from _raw_changes(ours.config, theirs.config)
        return
    yield from _spec_changes(*specs)


def input_changes(name: str, ours: Scheme, theirs: Scheme) -> Iterator[Change]:
    """Inputs that only one of the two quantizes, or that both do differently."""
    pair = _inputs(ours), _inputs(theirs)
    if pair[0] != pair[1]:
        yield Change("inputs", name, *pair, True)


def tokenizer_changes(ours: Checkpoint, theirs: Checkpoint) -> Iterator[Change]:
    """Vocabulary, how a text is split, the tokens with a role, and the chat template."""
    try:
        first, second = ours.tokenizer(), theirs.tokenizer()
    except InputError as error:
        yield Change("tokenizer", "tokenizer", "", error.message, False)
        return
    from aphroquant.calibration.data import default_text

    text = default_text("evaluation")[:_SAMPLE_CHARACTERS]
    if first.get_vocab() != second.get_vocab():
        yield Change("tokenizer", "vocabulary", f"{len(first)} tokens", f"{len(second)} tokens", True)
    elif first.encode(text, add_special_tokens=False) != second.encode(text, add_special_tokens=False):
        yield Change("tokenizer", "splitting", "", "the same text becomes other tokens", True)
    for name in ("bos_token_id", "eos_token_id"):
        pair = str(getattr(first, name)), str(getattr(second, name))
        if pair[0] != pair[1]:
            yield Change("tokenizer", name, *pair, True)
    if first.chat_template != second.chat_template:
        yield Change("tokenizer", "chat template", _size(first.chat_template), _size(second.chat_template), True)


def file_changes(ours: Checkpoint, theirs: Checkpoint) -> Iterator[Change]:
    """Carried files that differ in a byte, or that one of the two has not."""
    first = {path.name: path for path in ours.carried_files()}
    second = {path.name: path for path in theirs.carried_files()}
    for name in sorted({*first, *second}):
        if name not in first or name not in second:
            yield Change("file", name, "is there" if name in first else "", "is there" if name in second else "", False)
        elif not same_bytes(first[name], second[name]):
            sizes = [f"{path.stat().st_size} bytes" for path in (first[name], second[name])]
            yield Change("file", name, sizes[0], sizes[1], False)


def same_bytes(ours: Path, theirs: Path) -> bool:
    """Whether two files hold the same, read piece by piece."""
    try:
        return filecmp.cmp(ours, theirs, shallow=False)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror or error}") from error


def _spec_changes(ours: DecoderSpec, theirs: DecoderSpec) -> Iterator[Change]:
    for entry in fields(DecoderSpec):
        first, second = getattr(ours, entry.name), getattr(theirs, entry.name)
        if entry.name in ("tie_word_embeddings", "family") or first == second:
            continue
        if entry.name == "rope":
            yield Change("config", "rope", _rope_text(first), _rope_text(second), True)
        else:
            limits_only = entry.name == "max_position_embeddings"
            yield Change("config", entry.name, _short(first), _short(second), not limits_only)


def _raw_changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Change]:
    for key in sorted({*ours, *theirs} - _IRRELEVANT):
        if ours.get(key) != theirs.get(key):
            yield Change("config", key, _short(ours.get(key)), _short(theirs.get(key)), True)


def _inputs(scheme: Scheme) -> str:
    activations = scheme.activations if isinstance(scheme, IntegerScheme | FloatScheme | LookupScheme) else None
    if isinstance(scheme, DenseScheme) or activations is None:
        return "as they are"
    scales = "dynamic" if activations.dynamic else "static"
    return f"{activations.kind}{activations.bits} per {activations.granularity}, {scales}"


def _rope_text(rope: RopeSpec) -> str:
    parameters = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in rope.parameters.items()
    )
    return f"{rope.kind}, theta {rope.theta:g}" + (f", {parameters}" if parameters else "")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _size(template: object) -> str:
    return f"{len(template)} characters" if isinstance(template, str) else "none" if template is None else "several"
