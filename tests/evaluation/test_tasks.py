"""What tasks need before anything is measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from aphroquant.errors import UsageError
from aphroquant.evaluation import TaskSettings, measure_tasks
from aphroquant.evaluation.tasks import TaskScore


def test_without_the_harness_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(UsageError) as caught:
        measure_tasks(["a"], against="b", settings=TaskSettings(("arc_easy",)))
    assert caught.value.hint == "pip install 'aphroquant[tasks]'"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ()}, "there is no task to run"),
        ({"names": ("a",), "path": Path("/nowhere")}, "/nowhere is not a directory"),
        ({"names": ("a",), "limit": 0}, "task limit = 0 must be at least 1"),
        ({"names": ("a",), "num_fewshot": -1}, "fewshot = -1 must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TaskSettings(**settings)


def test_recovery_is_the_share_of_the_bases_score() -> None:
    score = {"task": "t", "metric": "acc", "stderr": None, "base_stderr": None, "num_samples": 1, "num_fewshot": None}
    assert TaskScore(**score, value=0.45, base_value=0.5, higher_is_better=True).recovery == pytest.approx(0.9)
    assert TaskScore(**score, value=0.45, base_value=0.0, higher_is_better=True).recovery is None
