"""Calibration texts mixed by weight, packed by documents, rendered by other templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphroquant.calibration.data import CalibrationData, calibration_windows, shared_out
from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import InputError, UsageError


@pytest.fixture
def tokenizer(tiny_checkpoint: Callable[..., Path]) -> Any:
    return open_checkpoint(tiny_checkpoint("llama")).tokenizer()


def windows(tokenizer: Any, paths: list[Path], samples: int = 6, **options: Any) -> CalibrationData:
    return calibration_windows(tokenizer, paths, **{"samples": samples, "seq_len": 16, "seed": 0, **options})


@given(st.integers(1, 1000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_shares_add_up_and_are_within_one_of_what_weights_say(samples: int, weights: list[float]) -> None:
    shares = shared_out(samples, weights)
    assert sum(shares) == samples
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - samples * weight / sum(weights)) < 1 + 1e-9


def test_each_text_gives_its_share_of_the_windows(tokenizer: Any, tmp_path: Path) -> None:
    for name, word in (("a.txt", "fox "), ("b.txt", "10 ")):
        (tmp_path / name).write_text(word * 400)
    data = windows(tokenizer, [tmp_path / "a.txt", tmp_path / "b.txt"], samples=8, weights=[3, 1])
    found = ["fox" in tokenizer.decode(window) for window in data.windows]
    assert found == [True] * 6 + [False] * 2
    assert [source.name for source in data.sources] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    with pytest.raises(InputError, match=r"a\.txt has .* windows of 16, not 5999"):
        windows(tokenizer, [tmp_path / "a.txt", tmp_path / "b.txt"], samples=6000, weights=[5999, 1])


def test_windows_packed_by_documents_begin_where_documents_do(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    texts = ["Hello! How are you today?", "In 1984, 2 + 2 made 4;", "The quick brown fox jumps over the lazy dog."] * 20
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = windows(tokenizer, [path], samples=8, packing="documents")
    for window in data.windows:
        assert tokenizer.decode(window).startswith(("Hello!", "In 1984", "The quick"))
    stream = windows(tokenizer, [path], samples=8)
    assert not all(tokenizer.decode(window).startswith(("Hello!", "In", "The")) for window in stream.windows)
    (tmp_path / "long.txt").write_text(" ".join(texts))
    assert windows(tokenizer, [tmp_path / "long.txt"], samples=20, packing="documents").windows.shape == (20, 16)


def test_another_template_renders_conversations(tokenizer: Any, tmp_path: Path) -> None:
    path, template = tmp_path / "chat.jsonl", tmp_path / "template.jinja"
    messages = [{"role": "user", "content": "hello hello hello"}, {"role": "assistant", "content": "fine fine"}]
    path.write_text((json.dumps({"messages": messages}) + "\n") * 30)
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")

    def text(chat_template: Path | None) -> str:
        return str(tokenizer.decode(windows(tokenizer, [path], chat_template=chat_template).windows.flatten()))

    assert "<user>hello" in text(template)
    assert "<|im_start|>" in text(None)
    plain = text(Path("none"))
    assert "hello" in plain
    assert "im_start" not in plain
    template.write_text("{{ 1 / 0 }}")
    with pytest.raises(InputError, match="the given chat template refuses"):
        text(template)


def test_the_bundled_texts_stand_among_others(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fox " * 400)
    alone = windows(tokenizer, [])
    assert windows(tokenizer, [Path("default")]).sha256 == alone.sha256
    mixed = windows(tokenizer, [tmp_path / "a.txt", Path("default")], weights=[1, 1])
    assert mixed.sources[0].name == str(tmp_path / "a.txt")
    assert len(mixed.sources) == 1 + len(alone.sources)


def test_impossible_mixtures_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    for options, message in (
        ({"weights": [1.0]}, "1 weights for 0 calibration texts"),
        ({"packing": "boxes"}, "unknown packing 'boxes'"),
    ):
        with pytest.raises(UsageError, match=message):
            windows(tokenizer, [], **options)
    with pytest.raises(UsageError, match="must be a positive number"):
        windows(tokenizer, [tmp_path], weights=[float("nan")])
