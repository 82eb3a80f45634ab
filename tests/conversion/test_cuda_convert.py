"""Calibrating, solving and evaluating on a GPU: the same numbers as on the CPU, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.conversion import convert
from aphroquant.evaluation import evaluate

TinyCheckpoint = Callable[..., Path]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


@pytest.mark.parametrize("solver", ["rtn", "gptq", "awq", "awq-gptq"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_both_devices_solve_layers_equally_well(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, solver: str, family: str
) -> None:
    source = tiny_checkpoint(family)
    results = [
        convert(
            source, to="awq", out=tmp_path / device, group_size=32, solver=solver, samples=8, seq_len=32, device=device
        )
        for device in ("cpu", "cuda")
    ]
    errors = [result.mean_relative_error for result in results]
    assert errors[0] is not None
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_both_devices_measure_the_same_divergence(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    convert(source, to="awq", out=tmp_path / "out", group_size=32, solver="rtn", samples=0, device="cuda")
    found = [
        evaluate(tmp_path / "out", against=source, windows=2, window_len=32, device=device)
        for device in ("cpu", "cuda")
    ]
    assert found[1].mean_kld == pytest.approx(found[0].mean_kld, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_training_on_a_gpu_repeats_exactly_and_helps_as_on_a_cpu(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str
) -> None:
    source = tiny_checkpoint(family)
    found = {}
    for name, device, steps in (("plain", "cuda", 0), ("a", "cuda", 40), ("b", "cuda", 40), ("cpu", "cpu", 40)):
        convert(
            source,
            to="gptq",
            bits=2,
            out=tmp_path / name,
            group_size=32,
            solver="rtn",
            samples=32,
            seq_len=32,
            device=device,
            refine_steps=steps,
            distill_steps=steps,
        )
        found[name] = evaluate(tmp_path / name, against=source, windows=8, window_len=32, device="cpu").mean_kld
    assert found["a"] < 0.7 * found["plain"]
    assert found["a"] == pytest.approx(found["cpu"], rel=0.2)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
