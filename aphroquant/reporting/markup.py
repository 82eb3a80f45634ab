"""HTML and SVG as values: elements are built from names, attributes and children, and every plain text is escaped.

Names of models, texts and tokens come from files that anybody may have written. What is not `Markup` cannot reach the
page unescaped, so that there is nothing to forget.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from typing import TypeAlias

Child: TypeAlias = "str | int | float | Iterable[Child] | None"
Attribute: TypeAlias = "str | int | float | bool | None"

_VOID = frozenset({"meta", "br", "hr", "col"})
_SHAPES = frozenset({"circle", "line", "path", "polyline", "polygon", "rect"})  # SVG elements that may close themselves


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """One element. Attributes: class_ is class, a_b is a-b; those that are None or False are left out."""
    shown = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    inner = join(children)
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    if name in _SHAPES and not inner:
        return Markup(f"<{name}{shown}/>")
    return Markup(f"<{name}{shown}>{inner}</{name}>")


def join(children: Child) -> Markup:
    """Children as one piece of markup: texts escaped, elements as they are, None left out."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(html.escape(visible(children)))
    if isinstance(children, int | float):
        return Markup(number(children))
    return Markup("".join(join(child) for child in children))


def visible(text: str) -> str:
    """The text without what steers a reader's display instead of being seen: controls and directional marks."""
    if text.isprintable():
        return text
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    category = unicodedata.category(char)
    if char in "\n\t" or category not in ("Cc", "Cf", "Cs", "Co", "Cn"):
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def number(value: float) -> str:
    """A coordinate: no more digits than a pixel needs."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _attribute(name: str, value: str | int | float | bool) -> str:
    key = name.rstrip("_").replace("_", "-").replace("view-box", "viewBox")
    if value is True:
        return f" {key}"
    text = value if isinstance(value, str) else number(value)
    return f' {key}="{html.escape(visible(text), quote=True)}"'
