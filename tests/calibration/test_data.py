"""Calibration windows: files of every kind, seeds, errors that name file and line, the bundled texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aphroquant.calibration import data
from aphroquant.calibration.data import DEFAULT_TEXTS, calibration_windows, default_text
from aphroquant.errors import InputError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Callable[..., Path]) -> Any:
    from aphroquant.checkpoint import open_checkpoint

    return open_checkpoint(tiny_checkpoint("llama")).tokenizer()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Line {number} of a text that is long enough." for number in range(300)))
    return path


def test_windows_have_the_asked_shape_and_are_cut_from_the_text(tokenizer: Any, text_file: Path) -> None:
    found = calibration_windows(tokenizer, [text_file], samples=5, seq_len=32, seed=0)
    assert found.windows.shape == (5, 32)
    assert found.windows.dtype == torch.int64
    text = text_file.read_text()
    for window in found.windows:
        assert tokenizer.decode(window).strip() in text


def test_the_seed_decides_and_repeats(tokenizer: Any, text_file: Path) -> None:
    first, again, other = (
        calibration_windows(tokenizer, [text_file], samples=4, seq_len=16, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.windows, again.windows)
    assert first.sha256 == again.sha256
    assert not torch.equal(first.windows, other.windows)


def test_no_window_is_taken_twice(tokenizer: Any, text_file: Path) -> None:
    everything = calibration_windows(tokenizer, [text_file], samples=1, seq_len=16, seed=0).num_tokens // 16
    found = calibration_windows(tokenizer, [text_file], samples=everything, seq_len=16, seed=0)
    assert len(found.windows) == everything


def test_a_short_text_says_how_many_tokens_it_has(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A few words only.")
    tokens = len(tokenizer("A few words only.\n\n", add_special_tokens=False)["input_ids"])
    with pytest.raises(InputError, match=rf"has {tokens} tokens: 0 windows of 512, not 8"):
        calibration_windows(tokenizer, [path], samples=8, seq_len=512, seed=0)
    with pytest.raises(InputError) as caught:
        calibration_windows(tokenizer, [path], samples=8, seq_len=4, seed=0)
    assert f"--samples {tokens // 4}" in (caught.value.hint or "")


@pytest.mark.parametrize(("name", "text"), [("empty.txt", ""), ("blank.txt", " \n\n"), ("empty.jsonl", "")])
def test_a_file_without_text_is_named(tokenizer: Any, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: holds no text"):
        calibration_windows(tokenizer, [tmp_path / name], samples=1, seq_len=2, seed=0)


def test_jsonl_records_of_every_kind_are_read(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = [
        {"messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day"}]},
        {"text": "Plain words"},
        {"prompt": "A question", "response": "An answer"},
    ]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    found = calibration_windows(tokenizer, [path], samples=1, seq_len=8, seed=0)
    whole = calibration_windows(tokenizer, [path], samples=found.num_tokens // 2, seq_len=2, seed=0)
    text = tokenizer.decode(whole.windows.reshape(-1))
    assert "<|im_start|>user\nHello there<|im_end|>" in text
    assert "<|im_start|>assistant\nAn answer" in text
    assert "Plain words" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not valid JSON"),
        ("[1, 2]", "must hold a JSON object, not list"),
        ('{"words": "x"}', "its keys are 'words'"),
        ("{}", "its keys are none"),
        ('{"text": 3}', "text must be a string, not int"),
        ('{"messages": []}', "messages must be a list"),
        ('{"messages": [{"role": "user"}]}', "a role and a content"),
    ],
)
def test_a_bad_record_is_named_with_file_and_line(tokenizer: Any, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError) as caught:
        calibration_windows(tokenizer, [path], samples=1, seq_len=2, seed=0)
    assert str(caught.value).startswith(f"{path}, line 2:")
    assert message in str(caught.value)


def test_text_that_is_not_utf8_is_named_with_its_line(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("fine\nbl\xf6d".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt, line 2: is not UTF-8"):
        calibration_windows(tokenizer, [path], samples=1, seq_len=2, seed=0)


def test_a_missing_file_is_an_input_error(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        calibration_windows(tokenizer, [tmp_path / "none.txt"], samples=1, seq_len=2, seed=0)


def test_nonsense_sizes_are_usage_errors(tokenizer: Any, text_file: Path) -> None:
    for samples, seq_len in ((0, 8), (1, 1)):
        with pytest.raises(UsageError, match="at least"):
            calibration_windows(tokenizer, [text_file], samples=samples, seq_len=seq_len, seed=0)


def test_several_files_form_one_text(tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely. " * 50)
    alone = calibration_windows(tokenizer, [text_file], samples=1, seq_len=8, seed=0)
    both = calibration_windows(tokenizer, [text_file, other], samples=1, seq_len=8, seed=0)
    assert both.num_tokens > alone.num_tokens
    assert [Path(source.name).name for source in both.sources] == ["text.txt", "other.txt"]


def test_the_bundled_texts_are_enough_and_disjoint(tokenizer: Any) -> None:
    found = calibration_windows(tokenizer, samples=128, seq_len=512, seed=0)
    assert found.windows.shape == (128, 512)
    assert all(source.name.startswith("default: calibration_") for source in found.sources)
    calibration, evaluation = default_text("calibration"), default_text("evaluation")
    assert len(evaluation) > 80_000
    lines = {line for line in calibration.splitlines() if len(line) > 200}
    assert not lines & set(evaluation.splitlines())


def test_the_bundled_files_stay_small_and_name_their_sources() -> None:
    files = list(DEFAULT_TEXTS.iterdir())
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert max(path.stat().st_size for path in files) < 500_000
    readme = (DEFAULT_TEXTS / "README.md").read_text(encoding="utf-8")
    for path in files:
        assert path.name == "README.md" or path.name in readme


def test_cutting_a_long_text_loses_nothing() -> None:
    for text in ("word " * 60_000, "line\n" * 60_000, "x" * 300_000, "para\n\n" * 50_000):
        pieces = data._pieces(text)
        assert len(pieces) > 1
        assert "".join(pieces) == text


def test_the_kind_of_a_file_does_not_depend_on_the_case_of_its_name(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "RECORDS.JSONL"
    path.write_text("no json\n")
    with pytest.raises(InputError, match="line 1: is not valid JSON"):
        calibration_windows(tokenizer, [path], samples=1, seq_len=2, seed=0)


def test_a_json_document_is_not_taken_for_text(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"text": "words " * 50}]))
    with pytest.raises(InputError, match="is JSON, but calibration reads text and JSONL"):
        calibration_windows(tokenizer, [path], samples=1, seq_len=2, seed=0)
