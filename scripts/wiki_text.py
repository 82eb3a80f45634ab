"""Plain text of the articles in a MediaWiki XML dump: no templates, tables, references, files or link targets.

What is kept reads as prose: titles and headings on lines of their own, paragraphs, list items. The sections that are
only lists of links (See also, References, ...) are left out.
"""

from __future__ import annotations

import bz2
import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

MIN_CHARACTERS = 500  # shorter pages are redirects and stubs

_LINK_SECTIONS = "See also|References|Notes|Footnotes|Further reading|External links|Bibliography|Sources|Citations"
_DROPPED_SECTION = re.compile(rf"^(==+)\s*(?:{_LINK_SECTIONS})\s*==+\s*$.*?(?=^==[^=]|\Z)", re.M | re.S | re.I)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_DROPPED_ELEMENT = re.compile(
    r"<(ref|math|gallery|timeline|syntaxhighlight|source|score|imagemap|pre)\b[^>/]*>.*?</\1\s*>", re.S | re.I
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.S)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]")
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$", re.M)
_LIST_MARK = re.compile(r"^[*#:;]+\s*", re.M)
_STRAY_MARKUP = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}")  # what unbalanced sources leave behind
_EMPTY_BRACKETS = re.compile(r"\(\s*[,;]*\s*\)")


def articles(dump: Path) -> Iterator[str]:
    """Each article of a bz2 dump as 'Title', a blank line, and its text."""
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            title, space, text = (page.findtext(f".//{{*}}{name}") or "" for name in ("title", "ns", "text"))
            page.clear()
            if space == "0" and not text.lstrip().upper().startswith("#REDIRECT"):
                plain = plain_text(text)
                if len(plain) >= MIN_CHARACTERS:
                    yield f"{title}\n\n{plain}"


def plain_text(markup: str) -> str:
    """The prose in one page's wiki markup."""
    text = _COMMENT.sub("", markup)
    text = re.sub(r"<ref\b[^>]*/>", "", text, flags=re.I)
    text = _DROPPED_ELEMENT.sub("", text)
    text = _until_stable(_TEMPLATE, _template_text, text)
    text = _until_stable(_TABLE, lambda _: "", text)
    text = _until_stable(_LINK, _link_text, text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _DROPPED_SECTION.sub("", text)
    text = _TAG.sub("", text)
    text = html.unescape(text).replace("\xa0", " ").replace("'''", "").replace("''", "")
    text = _LIST_MARK.sub("", _HEADING.sub(r"\2", text))
    text = _EMPTY_BRACKETS.sub("", _STRAY_MARKUP.sub("", text))
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ([,.;:)])", r"\1", text)
    lines = [line.strip() for line in text.splitlines()]
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip()


def _until_stable(pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace innermost matches until none is left: templates, tables and links nest."""
    while True:
        replaced = pattern.sub(replace, text)
        if replaced == text:
            return text
        text = replaced


def _template_text(match: re.Match[str]) -> str:
    """The few templates that stand for words in a sentence; all others are dropped."""
    name, *arguments = (part.strip() for part in match.group(1).split("|"))
    name = name.lower()
    if name in ("convert", "cvt") and len(arguments) >= 2:
        return f"{arguments[0]} {arguments[1]}"
    if name in ("lang", "transl", "transliteration", "nowrap", "nobr", "quote", "nihongo", "mvar", "math", "var"):
        words = [argument for argument in arguments if "=" not in argument]
        return words[-1] if words and name != "nihongo" else (words[0] if words else "")
    return " " if name in ("spaces", "nbsp") else ""


def _link_text(match: re.Match[str]) -> str:
    """The visible words of a link; nothing for files, categories and other languages."""
    target, _, label = match.group(1).partition("|")
    prefix = target.partition(":")[0].strip().lower()
    if ":" in target and not target.startswith(":") and (prefix in ("file", "image", "category") or len(prefix) <= 3):
        return ""
    return label.rpartition("|")[2] if label else target.lstrip(":")
