"""The sample model on the GPU and on the CPU: the same greedy text, but for near-ties."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.sample_model]

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_devices.py"
NEAR_TIE = 0.05  # nats


def test_the_sample_model_answers_alike_on_both_devices(sample_model: Path) -> None:
    from aphroquant.engine.cuda.choice import gpu_obstacle

    if reason := gpu_obstacle():
        pytest.skip(reason)
    spec = importlib.util.spec_from_file_location("compare_devices", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = str(sample_model)
    host = script.answers(model, 64, device="cpu", activations="float", kv_cache_dtype="float32")
    gpu = script.answers(model, 64, device="cuda", dtype="float16")
    rows = [script.compare(prompt, *pair) for prompt, *pair in zip(script.PROMPTS, host, gpu, strict=True)]
    apart = [row for row in rows if row["gap"] is not None and row["gap"] > NEAR_TIE]
    assert not apart, apart
