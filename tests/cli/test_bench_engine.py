"""aphroquant bench engine: what it refuses, and its last line on a small checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.cli import run
from aphroquant.engine.cuda.synthetic import SYNTHETIC_MODELS, synthetic_spec

TinyCheckpoint = Callable[..., Path]


def test_the_last_line_is_json_with_a_row_for_each_batch(
    tiny_checkpoint: TinyCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--batch", "1,3", "--context", "8", "--steps", "3"]
    assert run(["bench", "engine", str(tiny_checkpoint("llama")), *arguments]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch"] for row in report["rows"]] == [1, 3]
    assert all(row["decode_tokens_per_second"] > 0 and row["steps"] == 3 for row in report["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either DIR or --synthetic NAME"),
        (["--synthetic", "llama-3-8b", "--batch", "1,x"], "--batch '1,x' must be numbers"),
        (["--synthetic", "llama"], "--synthetic 'llama' must be one of llama-3-8b"),
        (["--synthetic", "llama-3-8b", "--scheme", "w9"], "scheme 'w9' must be"),
    ],
)
def test_bad_arguments_end_in_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "engine", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_synthetic_weights_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "engine", "--synthetic", "llama-3-8b"]) == 2
    assert "--synthetic needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", SYNTHETIC_MODELS)
def test_every_named_model_has_a_shape(name: str) -> None:
    spec = synthetic_spec(name)
    assert spec.num_heads % spec.num_kv_heads == 0
    assert spec.max_position_embeddings == 131072
