"""SIGKILL at random moments, and the same command again until there is an output: the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Tiny = Callable[..., Path]
KILLING = Path(__file__).parent / "killing.py"
QUICK: dict[str, Any] = {
    "to": "gptq",
    "bits": 3,
    "samples": 16,
    "seq_len": 32,
}


@pytest.mark.parametrize(
    ("kills", "options"), [(12, {}), (8, {"solver": "rtn", "refine_steps": 2, "distill_steps": 8})]
)
def test_a_conversion_that_is_killed_at_random_moments_ends_in_the_same_bytes(
    tiny_checkpoint: Tiny, tmp_path: Path, kills: int, options: dict[str, Any]
) -> None:
    source = tiny_checkpoint("llama", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} times the quick brown fox jumps over the lazy dog. " for number in range(200)))
    # A fork has none of the threads that its parent may have begun.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(KILLING), str(source), str(tmp_path), str(kills), "0"],
        input=json.dumps({**QUICK, **options, "calibration": str(text)}),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] >= kills
    assert told["outputs"] >= 1
    assert told["differ"] == []
    assert set(told["left"]) <= {".out.job"}  # killed after the output was there, before the job was removed
