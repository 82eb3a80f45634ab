"""Calibration files as texts: plain text as it is, JSONL line by line, conversations through the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aphroquant.checkpoint.template_limits import limited_rendering
from aphroquant.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JSONL_SUFFIXES = (".jsonl", ".ndjson")
_QUESTIONS = ("prompt", "instruction", "question")
_ANSWERS = ("response", "completion", "output", "answer")


NO_TEMPLATE = "none"  # in place of a file: contents are joined as they are


def read_template(path: Path) -> str:
    """The content of a Jinja file; empty for "none"."""
    return "" if str(path) == NO_TEMPLATE else _read(path)


def read_documents(path: Path, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> Iterator[str]:
    """The texts of one file: the whole of a text file, each record of a JSONL file.

    `template` renders conversations in place of the model's own; an empty one stands for none at all.
    """
    template = tokenizer.chat_template if template is None else template
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise InputError(
            f"{path}: is JSON, but calibration reads text and JSONL", hint="one object a line, in a .jsonl file"
        )
    content = _read(path)
    if suffix not in JSONL_SUFFIXES:
        yield content
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _record_text(_parse(line, where), where, tokenizer, template)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: is not UTF-8 text (byte {error.start})") from error


def _parse(line: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: must hold a JSON object, not {type(record).__name__}")
    return record


def _record_text(record: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, template: Any) -> str:
    if "messages" in record:
        return _render(record["messages"], where, tokenizer, template)
    if "text" in record:
        return _string(record, "text", where)
    question = next((key for key in _QUESTIONS if key in record), None)
    answer = next((key for key in _ANSWERS if key in record), None)
    if question is None or answer is None:
        known = "messages, text, or a prompt and a response"
        raise InputError(f"{where}: has none of {known}; its keys are {', '.join(map(repr, record)) or 'none'}")
    texts = _string(record, question, where), _string(record, answer, where)
    if not template:
        return "\n\n".join(texts)
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    return _render(messages, where, tokenizer, template)


def _render(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase, template: Any) -> str:
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages) or not messages:
        raise InputError(f"{where}: messages must be a list of objects with a role and a content")
    if not template:
        return "\n\n".join(str(message["content"]) for message in messages)
    own = template is tokenizer.chat_template
    try:
        with limited_rendering(template):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, chat_template=None if own else template))
    except Exception as error:  # templates are programs, and fail in any way they like
        whose = "the model's" if own else "the given"
        raise InputError(f"{where}: {whose} chat template refuses the messages: {error}") from error


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be a string, not {type(value).__name__}")
    return value
