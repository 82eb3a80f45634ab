"""Stop strings end the text at the same place however it is cut into tokens, and no part of them is shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphroquant.engine.output_text import OutputText


class Script:
    """A detokenizer whose token i has the i-th of some texts."""

    def __init__(self, texts: list[str], rest: str = "") -> None:
        self.texts, self.rest = texts, rest

    def add(self, token: int) -> str:
        return self.texts[token]

    def finish(self) -> str:
        return self.rest


def shown(texts: list[str], stop: list[str], *, include_stop: bool = False, rest: str = "") -> list[str]:
    output = OutputText(Script(texts, rest), stop, include_stop=include_stop)
    pieces = []
    for token in range(len(texts)):
        pieces.append(output.add(token))
        if output.is_stopped:
            break
    return [*pieces, output.finish()]


def expected(text: str, stop: list[str], include_stop: bool) -> str:
    """The stop string that is complete first ends the text; of two that end together, the longer."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            return text[: end if include_stop else end - max(map(len, found))]
    return text


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=10),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.booleans(),
)
def test_text_ends_at_the_first_complete_stop_string(texts: list[str], stop: list[str], include_stop: bool) -> None:
    assert "".join(shown(texts, stop, include_stop=include_stop)) == expected("".join(texts), stop, include_stop)


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_what_is_shown_is_never_taken_back_and_held_text_is_minimal(text: str, stop: list[str]) -> None:
    output = OutputText(Script(list(text)), stop)
    sum_shown = ""
    for token in range(len(text)):
        sum_shown += output.add(token)
        if output.is_stopped:
            break
        held = text[len(sum_shown) : token + 1]
        assert text.startswith(sum_shown)
        assert held == "" or any(string.startswith(held) for string in stop)


def test_a_stop_string_over_three_tokens_is_not_leaked() -> None:
    assert shown(["one <", "st", "op> two"], ["<stop>"]) == ["one ", "", "", ""]


def test_a_false_alarm_is_shown_as_soon_as_it_is_one() -> None:
    assert shown(["one <", "st", "ar>"], ["<stop>"]) == ["one ", "", "<star>", ""]


def test_held_text_is_shown_at_the_end() -> None:
    assert shown(["one <st"], ["<stop>"]) == ["one ", "<st"]


def test_the_stop_string_is_shown_when_asked_for_and_nothing_after_it() -> None:
    assert shown(["one <st", "op> two"], ["<stop>"], include_stop=True) == ["one ", "<stop>", ""]


def test_the_last_characters_can_complete_a_stop_string() -> None:
    assert shown(["one <st"], ["<st\ufffd"], rest="\ufffd") == ["one ", ""]


def test_text_that_may_not_stop_is_shown_at_once_and_is_no_part_of_a_match() -> None:
    output = OutputText(Script(["x<st", "op>", "<stop>"]), ["<stop>"])
    assert output.add(0, search=False) == "x<st"
    assert output.add(1) == "op>"
    assert not output.is_stopped
    assert output.add(2) == ""
    assert output.is_stopped


@pytest.mark.timeout(20)
def test_a_long_self_similar_stop_string_costs_linear_time() -> None:
    stop = "a" * 100_000 + "b"
    assert "".join(shown(["a" * 1000] * 300, [stop])) == "a" * 300_000
