"""The pipeline as a plain shell script: it passes once and fails its gate once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "pipeline_demo"
QUICK = {"SAMPLES": "2", "SEQ_LEN": "32", "WINDOWS": "2", "WINDOW_LEN": "32", "MAX_KLD": "50"}


def test_the_script_passes_once_and_fails_its_gate_once(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", hidden_size=256, intermediate_size=512)
    environment = {**os.environ, **QUICK, "APHROQUANT": str(Path(sys.executable).parent / "aphroquant")}
    command = [SCRIPT, str(source), str(tmp_path / "demo")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "demo: passed" in finished.stdout
    assert "demo: FAILED" in finished.stdout
    assert "error: the quality gate failed: awq: mean KLD" in finished.stderr
    assert (tmp_path / "demo" / "released" / "awq" / "model.safetensors").is_file()
    assert not (tmp_path / "demo" / "refused").exists()
