"""Where greedy answers part."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import UsageError
from aphroquant.evaluation.drift import figures, first_difference, measure_drift, prompt_sets
from aphroquant.evaluation.texts import read_texts

TinyCheckpoint = Callable[..., Path]
Copy = Callable[..., Path]


@pytest.mark.parametrize(
    ("ours", "theirs", "place"),
    [([1, 2, 3], [1, 2, 3], math.inf), ([1, 2], [1, 3], 1), ([5], [6], 0), ([1, 2], [1, 2, 3], 2), ([], [], math.inf)],
)
def test_an_end_counts_as_a_token(ours: list[int], theirs: list[int], place: float) -> None:
    assert first_difference(ours, theirs) == first_difference(theirs, ours) == place


def test_quartiles_are_not_reached_where_most_answers_agree() -> None:
    expected = [[7] * 32 for _ in range(5)]
    found = [[7] * place + [8] * (32 - place) for place in (4, 20, 32, 32, 32)]
    drift = figures("short", [[1]] * 5, expected, found, 32)
    assert drift.quartiles == (20, None, None)
    assert drift.never == 0.6
    assert drift.identical_after == {"8": 0.8, "16": 0.8, "32": 0.6}


def test_a_model_does_not_drift_from_itself(tiny_checkpoint: TinyCheckpoint, text_file: Path) -> None:
    base = tiny_checkpoint("llama")
    seen = []
    (drift,) = measure_drift(
        [base], against=base, texts=[text_file], max_tokens=12, on_progress=lambda *n: seen.append(n)
    )
    assert {kind.kind for kind in drift.kinds} == {"short text", "long text", "reasoning"}
    assert all(kind.never == 1 and kind.quartiles == (None, None, None) for kind in drift.kinds)
    total = sum(kind.prompts for kind in drift.kinds)
    assert ("base", total, total) in seen
    assert ("model", total, total) in seen


def test_answers_are_those_of_transformers(tiny_checkpoint: TinyCheckpoint, noisy_copy: Copy, text_file: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny_checkpoint("llama")
    model = noisy_copy(base, 0.3)
    (drift,) = measure_drift([model], against=base, texts=[text_file], max_tokens=16)
    sets = prompt_sets(open_checkpoint(base), read_texts([text_file]), 16)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, model)]
    for kind, one in zip(drift.kinds, sets, strict=True):
        answers = [
            [
                m.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
                for prompt in one.prompts
            ]
            for m in models
        ]
        expected = figures(one.kind, one.prompts, *answers, 16)
        assert kind == expected
        assert kind.never < 1


def test_prompts_and_answers_fit_the_context(tiny_checkpoint: TinyCheckpoint, text_file: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    for one in prompt_sets(checkpoint, read_texts([text_file]), 500):
        assert all(len(prompt) <= 12 for prompt in one.prompts)
    with pytest.raises(UsageError, match="drift tokens = 512 must be less than 512, the context length"):
        measure_drift([checkpoint.path], against=checkpoint.path, max_tokens=512)
    with pytest.raises(UsageError, match="drift tokens = 0 must be at least 1"):
        measure_drift([checkpoint.path], against=checkpoint.path, max_tokens=0)
