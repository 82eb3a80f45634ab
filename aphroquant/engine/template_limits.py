"""Limits on chat templates, which are programs that come with a model: on their time, and on what they make.

transformers' sandbox keeps a template from the machine, and from changing what it is given, but lets it loop or grow for
ever. A template is stopped when it takes too long or a value of it grows too large, looked at before each of its lines;
what could do either within one line (powers, huge numbers, repeated strings) is refused before it runs.
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
_TEMPLATE_FILES = ("<template>", "<unknown>")  # what Jinja calls code without a file
_LONG_FIELD = re.compile(r"[%{][^}%]*\d{7}")  # a width in a format string
_OPERATORS = {"*", "**"}


class TemplateLimitError(TemplateError):
    """The chat template was stopped."""


def check_template(template: str) -> None:
    """TemplateLimitError for a template that could do any amount of work within one line."""
    problem = _problem(template)
    if problem is not None:
        raise TemplateLimitError(f"the chat template {problem}")


@contextmanager
def limited_rendering() -> Iterator[None]:
    """Stop templates that are rendered inside, in this thread, at the limits."""
    deadline = time.monotonic() + MAX_SECONDS
    before = sys.gettrace()
    sys.settrace(_tracer(deadline))
    try:
        yield
    finally:
        sys.settrace(before)


def _tracer(deadline: float) -> Callable[[FrameType, str, Any], Any]:
    def each_line(frame: FrameType, event: str, argument: Any) -> Any:
        _check_time(deadline)
        for value in frame.f_locals.values():
            _check_size(value)
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
    times = 0
    before: tuple[str, str] = ("", "")
    try:
        tokens = [(kind, text) for _, kind, text in Environment(autoescape=True).lex(template) if kind != "whitespace"]
    except TemplateSyntaxError:
        return None
    for kind, text in tokens:
        if kind in ("block_begin", "variable_begin"):
            times = 0
        elif kind == "operator" and text in _OPERATORS:
            times += 1
            if text == "**" or times > 1 or before[0] == "string":
                return f"uses {text} in a way that can grow without end"
        elif kind == "string" and (before == ("operator", "*") or _LONG_FIELD.search(text)):
            return f"repeats or widens the string {text[:40]}"
        elif kind in ("integer", "float") and float(text.replace("_", "")) > MAX_NUMBER:
            return f"uses the number {text[:20]}, the limit is {MAX_NUMBER}"
        before = kind, text
    return None
