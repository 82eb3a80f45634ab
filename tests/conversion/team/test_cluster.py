"""Layers and experts that a Ray cluster solves are those that one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.conversion.team.cluster import is_cluster
from aphroquant.conversion.team.hiring import num_workers
from aphroquant.errors import UsageError

Tiny = Callable[..., Path]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_cluster_solves_the_same_layers(tiny_checkpoint: Tiny, tmp_path: Path, family: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'aphroquant[ray]'")
    more = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} times the quick brown fox jumps over the lazy dog. " for number in range(200)))
    options = ("--to", "gptq" if family == "llama" else "compressed-tensors", "--group-size", "32", "--seq-len", "32")
    options += ("--samples", "19", "--calibration", str(text), "--device", "cpu")
    for workers in ("1", "ray:2"):
        command = [sys.executable, "-m", "aphroquant", "convert", str(tiny_checkpoint(family, **more)), *options]
        command += ["--workers", workers, "--out", str(tmp_path / workers[:1] / "out")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_DISABLE_IMPORT_WARNING": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    weights = [(tmp_path / folder / "out" / "model.safetensors").read_bytes() for folder in "1r"]
    assert weights[0] == weights[1]


def test_without_ray_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from aphroquant.conversion.team.cluster import connected

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="--workers ray:2 needs Ray") as caught, connected("ray:2"):
        pass
    assert caught.value.hint == "pip install 'aphroquant[ray]'"


def test_clusters_are_told_from_numbers() -> None:
    assert [is_cluster(name) for name in (2, "2", "auto", "ray", "ray:4", "ray://head:10001")] == [False] * 3 + [
        True
    ] * 3
    assert num_workers("ray:4", torch.device("cpu"), 1) == 1


@pytest.mark.parametrize("wanted", ["ray:", "ray:0", "ray:many", "rays", "ray://"])
def test_what_is_no_cluster_is_refused(wanted: str) -> None:
    with pytest.raises(UsageError, match="must be a number, auto, ray, ray:N or ray://HOST:PORT"):
        is_cluster(wanted)
