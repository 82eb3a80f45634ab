"""Token windows: where they lie, and that both tokenizers must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aphroquant.errors import InputError, UsageError
from aphroquant.evaluation.texts import read_texts
from aphroquant.evaluation.windows import check_same_tokens, token_windows


def test_windows_are_whole_chunks_evenly_spaced() -> None:
    windows = token_windows(list(range(107)), 4, 10)  # ten whole chunks and a rest
    assert windows.shape == (4, 10)
    assert windows[:, 0].tolist() == [0, 20, 50, 70]  # chunks floor(i * 10 / 4)
    assert windows[2].tolist() == list(range(50, 60))


def test_a_short_text_gives_each_chunk_once() -> None:
    assert token_windows(list(range(35)), 8, 10)[:, 0].tolist() == [0, 10, 20]


def test_a_text_of_exactly_one_window_is_enough() -> None:
    assert token_windows(list(range(10)), 1, 10).shape == (1, 10)


@pytest.mark.parametrize("count", [0, 9])
def test_a_text_too_short_says_how_many_tokens_it_has(count: int) -> None:
    with pytest.raises(InputError, match=f"has {count} tokens, too few for one window of 10"):
        token_windows(list(range(count)), 1, 10)


def test_a_seed_draws_different_chunks_and_the_same_ones_again() -> None:
    draws = [token_windows(list(range(1000)), 5, 10, seed)[:, 0].tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert all(start % 10 == 0 for start in draws[0])
    assert len(set(draws[0])) == 5


class FakeTokenizer:
    """Splits at characters, or at spaces."""

    def __init__(self, vocabulary: dict[str, int], words: bool = False) -> None:
        self.vocabulary, self.words = vocabulary, words

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        pieces = text.split(" ") if self.words else list(text)
        return {"input_ids": [self.vocabulary[piece] for piece in pieces]}


LETTERS = {"a": 0, "b": 1, "ab": 2, " ": 3}


def check(base: FakeTokenizer, model: FakeTokenizer) -> None:
    check_same_tokens(base, model, "a b ab", ("BASE", "MODEL"))  # type: ignore[arg-type]


def test_equal_tokenizers_pass() -> None:
    check(FakeTokenizer(LETTERS), FakeTokenizer(dict(LETTERS)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({**LETTERS, "c": 4}, "differ in 1 tokens: 'c' is absent in BASE and 4 in MODEL"),
        ({"a": 0, "b": 1, "ab": 2}, "differ in 1 tokens: ' ' is 3 in BASE and absent in MODEL"),
        ({**LETTERS, "a": 1, "b": 0}, "differ in 2 tokens: "),
    ],
)
def test_a_different_vocabulary_is_refused_naming_a_token(other: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(FakeTokenizer(LETTERS), FakeTokenizer(other))


def test_one_vocabulary_used_differently_is_refused() -> None:
    with pytest.raises(UsageError, match="split the evaluation text differently, from token 1 on"):
        check(FakeTokenizer(LETTERS), FakeTokenizer(LETTERS, words=True))


def test_texts_are_read_one_by_one_and_hashed(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("abc")
    second.write_text("dé", encoding="utf-8")
    texts = read_texts([first, second])
    assert [text.content for text in texts] == ["abc", "dé"]
    sources = [text.source for text in texts]
    assert sources[0].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180 example
    assert [source.num_characters for source in sources] == [3, 2]


def test_a_text_given_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same")
    with pytest.raises(UsageError, match=r"a.txt and .*b.txt are the same; give it once"):
        read_texts([tmp_path / "a.txt", tmp_path / "b.txt"])


def test_a_text_that_is_not_utf8_is_refused_naming_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9!")
    with pytest.raises(InputError, match=r"latin.txt: is not UTF-8 text \(byte 3\)"):
        read_texts([path])


def test_a_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.txt: cannot be read: No such file"):
        read_texts([tmp_path / "none.txt"])


def test_one_text_need_not_be_a_list(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("words")
    assert read_texts(path) == read_texts(str(path)) == read_texts([path])
