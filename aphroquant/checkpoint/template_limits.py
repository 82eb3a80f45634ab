"""Limits on chat templates, which are programs that come with a model: on their time, and on what they make.

transformers' sandbox keeps a template from the machine, and from changing what it is given, but lets it loop or grow
for ever. A template is stopped when it takes too long or a value of it grows too large, looked at before each of its
lines; what could do either within one line (powers, huge numbers, products of unknowns) is refused before it runs.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError

MAX_SECONDS = 5.0
MAX_LENGTH = 2**24  # characters or items of one value
MAX_NUMBER = 10**6  # in the template; what it computes may be ten times that
MAX_FACTOR = 100  # a product needs a number of at most this as one of its two factors
_TEMPLATE_FILES = ("<template>", "<unknown>")  # what Jinja calls code without a file
_LONG_FIELD = re.compile(r"[%{][^}%]*\d{7}")  # a width in a format string


class TemplateLimitError(TemplateError):
    """The chat template was stopped."""


def check_template(template: str) -> None:
    """TemplateLimitError for a template that could do any amount of work within one line."""
    problem = _problem(template)
    if problem is not None:
        raise TemplateLimitError(f"the chat template {problem}")


@contextmanager
def limited_rendering(template: object) -> Iterator[None]:
    """Check the template, if it is one, and stop it at the limits when it is rendered inside, in this thread."""
    if isinstance(template, str):
        check_template(template)
    deadline = time.monotonic() + MAX_SECONDS
    before = sys.gettrace()
    sys.settrace(_tracer(deadline))
    try:
        yield
    finally:
        sys.settrace(before)


def _tracer(deadline: float) -> Callable[[FrameType, str, Any], Any]:
    length = 0

    def each_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal length
        _check_time(deadline)
        for value in frame.f_locals.values():
            _check_size(value)
        if event == "return" and isinstance(argument, str):  # a piece of the text, or what a macro gives
            length += len(argument)
            if length > MAX_LENGTH:
                raise TemplateLimitError(f"the chat template writes more than {MAX_LENGTH} characters")
        return each_line

    def each_call(frame: FrameType, event: str, argument: Any) -> Any:
        _check_time(deadline)
        return each_line if frame.f_code.co_filename in _TEMPLATE_FILES else None

    return each_call


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TemplateLimitError(f"the chat template takes more than {MAX_SECONDS:g} seconds")


def _check_size(value: Any, depth: int = 0) -> None:
    if isinstance(value, int):
        too_large = abs(value) > 10 * MAX_NUMBER
    else:
        too_large = isinstance(value, str | list | tuple | dict) and len(value) > MAX_LENGTH
    if too_large:
        raise TemplateLimitError("the chat template makes values that are too large")
    attributes = getattr(value, "_Namespace__attrs", None) if depth == 0 else None
    for attribute in (attributes or {}).values():
        _check_size(attribute, depth + 1)


@lru_cache(maxsize=64)
def _problem(template: str) -> str | None:
    """What is wrong with the template's tokens; None for a template that cannot be cut into any, which cannot run."""
    try:
        tokens = [(kind, text) for _, kind, text in Environment(autoescape=True).lex(template) if kind != "whitespace"]
    except TemplateSyntaxError:
        return None
    products = 0
    for index, (kind, text) in enumerate(tokens):
        if kind in ("block_begin", "variable_begin"):
            products = 0
        elif kind == "operator" and text == "**":
            return "uses **, which can grow without end"
        elif kind == "operator" and text == "*":
            products += 1
            if products > 1 or not any(map(_is_factor, tokens[index - 1 : index + 2 : 2])):
                return f"uses *, which can grow without end, but for one factor of at most {MAX_FACTOR}"
        elif kind == "string" and _LONG_FIELD.search(text):
            return f"widens text by {text[:40]}"
        elif kind in ("integer", "float") and _number(text) > MAX_NUMBER:
            return f"uses the number {text[:20]}; at most {MAX_NUMBER} is read"
    return None


def _is_factor(token: tuple[str, str]) -> bool:
    return token[0] == "integer" and _number(token[1]) <= MAX_FACTOR


def _number(text: str) -> float:
    """A literal as Jinja writes it: with underscores, in base 2, 8, 10 or 16."""
    return float(int(text, 0)) if text[:1] == "0" and text[1:2].isalpha() else float(text.replace("_", ""))
