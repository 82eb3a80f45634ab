"""The two layouts of logprobs."""

from __future__ import annotations

from aphroquant.engine.types import TokenLogprobs
from aphroquant.server.logprobs import chat_logprobs, completion_logprobs

TOKENS = [
    TokenLogprobs((5, -0.25, "é"), [(5, -0.25, "é"), (6, -1.5, "e")]),
    TokenLogprobs((7, float("-inf"), "\ufffd"), [(8, -0.1, "\ufffd"), (9, -0.2, "\ufffd")]),
]


def test_a_token_that_is_part_of_a_character_has_no_bytes() -> None:
    whole, part = chat_logprobs(TOKENS).content
    assert whole.bytes == [0xC3, 0xA9]
    assert part.bytes is None


def test_minus_infinity_becomes_a_number_that_json_can_say() -> None:
    assert chat_logprobs(TOKENS).content[1].logprob == -9999.0
    assert completion_logprobs(TOKENS, 0).token_logprobs == [-0.25, -9999.0]


def test_of_alternatives_with_one_text_the_better_is_kept() -> None:
    assert completion_logprobs(TOKENS, 0).top_logprobs == [{"é": -0.25, "e": -1.5}, {"\ufffd": -0.1}]


def test_offsets_count_characters_from_the_given_one() -> None:
    assert completion_logprobs(TOKENS, 10).text_offset == [10, 11]
    assert completion_logprobs([], 3).text_offset == []
