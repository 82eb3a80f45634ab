"""Some hundred cases of scripts/fuzz, and that the script would tell if one ended badly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2] / "scripts"
CASES_PER_FORMAT = 12


def fuzz(*arguments: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, str(SCRIPTS / "fuzz.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    lines = result.stdout.splitlines()
    return result.returncode, json.loads(lines[-1]) if lines else {}, result.stderr


def test_damaged_checkpoints_of_every_format_end_in_numbers_or_in_one_sentence() -> None:
    sys.path.insert(0, str(SCRIPTS))
    try:
        from fuzzing.corpus import names
    finally:
        sys.path.remove(str(SCRIPTS))
    code, counts, words = fuzz("--cases", str(CASES_PER_FORMAT * len(names())), "--seed", "7")
    assert code == 0, words[-5000:]
    assert counts["formats"].keys() == set(names())
    assert all(count["cases"] == CASES_PER_FORMAT for count in counts["formats"].values())
    assert counts["total"]["refused"] > counts["total"]["cases"] / 3
    assert counts["total"]["loaded"] > counts["total"]["cases"] / 6


def test_a_case_repeats_exactly_and_its_files_can_be_kept(tmp_path: Path) -> None:
    for name in ("first", "second"):
        code, _, words = fuzz("--only", "gptq-mixed", "11", "--keep", str(tmp_path / name))
        assert code == 0, words
    found = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
             for name in ("first", "second")}  # fmt: skip
    assert found["first"]
    assert found["first"] == found["second"]
