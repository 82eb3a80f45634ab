"""Some hundred cases of scripts/fuzz."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
CASES_PER_FORMAT = 8


def fuzz(*arguments: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, str(SCRIPTS / "fuzz.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    lines = result.stdout.splitlines()
    return result.returncode, json.loads(lines[-1]) if lines else {}, result.stderr


@pytest.fixture
def fuzzing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the script's own modules be imported."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_damaged_checkpoints_of_every_format_end_in_numbers_or_in_one_sentence(fuzzing: None) -> None:
    from fuzzing.corpus import names

    code, counts, words = fuzz("--cases", str(CASES_PER_FORMAT * len(names())), "--seed", "7")
    assert code == 0, words[-5000:]
    assert counts["formats"].keys() == set(names())
    assert all(count["cases"] == CASES_PER_FORMAT for count in counts["formats"].values())
    assert counts["total"]["refused"] > counts["total"]["cases"] / 3
    assert counts["total"]["loaded"] > counts["total"]["cases"] / 6


def test_a_case_repeats_exactly(fuzzing: None) -> None:
    from fuzzing.corpus import checkpoint_files
    from fuzzing.mutations import mutate

    for name in ("gptq-mixed", "gguf-q4_k"):
        files = checkpoint_files(name)
        for seed in range(20):
            first, second = (mutate(files, Random(f"{name} {seed}")) for _ in range(2))
            assert first == second, (name, seed)
            assert first[1], "something is done to it"
