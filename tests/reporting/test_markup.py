"""Texts become markup escaped, elements as they are."""

from __future__ import annotations

import html
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from aphroquant.reporting.markup import element, join, visible


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(), st.text())
def test_any_text_comes_back_as_text_and_attribute(text: str, value: str) -> None:
    reader = Reader()
    reader.feed(element("p", text, title=value))
    reader.close()
    assert reader.tags == ["p"]
    assert reader.text == visible(text)
    assert reader.attributes == [("title", visible(value))]


@given(st.text())
def test_what_is_escaped_once_is_not_escaped_again(text: str) -> None:
    assert join(join(text)) == html.escape(visible(text))


def test_what_steers_the_display_is_shown_instead() -> None:
    assert visible("a\u202eb\x1b[31m\x00") == "a\\u202eb\\u001b[31m\\u0000"
    assert visible("tab\tand line\n") == "tab\tand line\n"
    assert visible("\u0627\u0644 é 漢") == "\u0627\u0644 é 漢"


def test_names_of_attributes_and_absent_ones() -> None:
    found = element("svg", None, class_="a", stroke_width=1.5, view_box="0 0 1 1", hidden=None, open=False)
    assert found == '<svg class="a" stroke-width="1.5" viewBox="0 0 1 1"></svg>'
    assert element("details", open=True) == "<details open></details>"
    assert element("circle", r=1.0) == '<circle r="1"/>'
