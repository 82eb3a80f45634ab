"""Refinement and distillation of whole conversions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS, calibration_windows
from aphroquant.calibration.effort import EFFORTS
from aphroquant.calibration.training import TrainedInteger
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import ConversionResult, training_memory
from aphroquant.conversion.plan import make_plan
from aphroquant.conversion.request import ConversionRequest
from aphroquant.errors import UsageError
from aphroquant.evaluation import evaluate
from aphroquant.models.spec import DOWN, GATE, K, Q, V
from aphroquant.models.streamed import StreamedModel
from aphroquant.schemes import DenseScheme

Tiny = Callable[..., Path]
TEXT = DEFAULT_TEXTS / "calibration_chat.jsonl"
QUICK: dict[str, Any] = {"to": "gptq", "bits": 2, "group_size": 32, "samples": 32, "seq_len": 32, "calibration": TEXT}


def converted(source: Path, out: Path, **options: Any) -> ConversionResult:
    return aphroquant.convert(source, out=out, **{**QUICK, **options})


def divergence(source: Path, out: Path) -> float:
    return evaluate(out, against=source, windows=16, window_len=32).mean_kld


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_each_stage_of_training_lowers_the_divergence(tiny_checkpoint: Tiny, tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(family)
    found = []
    for refine, distill in ((0, 0), (40, 0), (40, 40)):
        out = tmp_path / f"{refine}-{distill}"
        result = converted(source, out, solver="rtn", refine_steps=refine, distill_steps=distill)
        assert set(result.refinement) == ({"model.layers.0", "model.layers.1"} if refine else set())
        assert bool(result.distillation) == bool(distill)
        found.append(divergence(source, out))
    assert found[1] < 0.7 * found[0]
    assert found[2] < found[1]


def test_training_moves_codebooks_too(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source, found = tiny_checkpoint("llama"), []
    for refine, distill in ((0, 0), (40, 40)):
        out = tmp_path / f"{refine}-{distill}"
        options = {"to": "aqlm", "scheme": "2x2", "bits": None, "group_size": None}
        converted(source, out, refine_steps=refine, distill_steps=distill, **options)
        found.append(divergence(source, out))
    assert found[1] < found[0]


def test_an_additive_model_runs_in_the_engine(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    converted(source, tmp_path / "out", to="aqlm", scheme="2x6", bits=None, group_size=None, samples=8)
    assert divergence(source, tmp_path / "out") < 0.2
    texts = []
    for backend in ("reference", "auto"):
        llm = aphroquant.LLM(str(tmp_path / "out"), backend=backend, num_kv_blocks=16)
        texts.append(llm.generate("one two", aphroquant.SamplingParams(temperature=0, max_tokens=4))[0].token_ids)
    assert len(texts[0]) == 4
    assert texts[0] == texts[1]


def test_the_same_seed_trains_to_the_same_bytes(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        converted(tiny_checkpoint("llama"), tmp_path / name, refine_steps=4, distill_steps=4, seed=3)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_what_stays_dense_and_the_norms_before_it_are_not_trained(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen2", torch_dtype="bfloat16")
    converted(source, tmp_path / "out", refine_steps=8, distill_steps=8, ignore=["o_proj", "up_proj", "layers.0.*"])
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    changed = {name for name in after.dense_names() if not torch.equal(before.read(name), after.read(name))}
    assert changed <= {"model.layers.1.input_layernorm.weight", "model.norm.weight"}
    quantized = {name for name, scheme in after.schemes().items() if not isinstance(scheme, DenseScheme)}
    assert quantized == {f"model.layers.1.{name}" for name in (Q, K, V, GATE, DOWN)}
    assert all(after.tensors[name].dtype == before.tensors[name].dtype for name in after.dense_names())


def test_the_distilled_model_is_the_one_that_was_measured(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    result = converted(source, tmp_path / "out", samples=4, distill_steps=16, solver="rtn")
    models = [StreamedModel(open_checkpoint(path)) for path in (source, tmp_path / "out")]
    windows = calibration_windows(open_checkpoint(source).tokenizer(), [TEXT], samples=4, seq_len=32, seed=0).windows
    logits = [model.logits(model.hidden_states(windows).flatten(0, 1)).log_softmax(-1) for model in models]
    measured = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())  # of 4 windows all are held out
    assert result.distillation["held_out_kld_after"] < result.distillation["held_out_kld_before"]
    assert measured == pytest.approx(result.distillation["held_out_kld_after"], rel=1e-3)


def test_the_gradient_that_goes_back_block_by_block_is_that_of_the_whole_model(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[int, list[torch.Tensor]] = {}
    original = TrainedInteger.step

    def watched(self: TrainedInteger, gradient: torch.Tensor, size: torch.Tensor) -> None:
        taken.setdefault(id(self), []).append(gradient.clone())
        original(self, gradient, size)

    monkeypatch.setattr(TrainedInteger, "step", watched)
    source = tiny_checkpoint("llama")
    converted(source, tmp_path / "out", samples=1, seq_len=16, distill_steps=1, solver="rtn", ignore=["v_proj"])
    monkeypatch.undo()
    converted(source, tmp_path / "start", samples=1, seq_len=16, solver="rtn", ignore=["v_proj"])
    gradients = [gradient for steps in taken.values() for gradient in steps[:1]]
    assert len(gradients) == 12
    expected = whole_gradients(source, tmp_path / "start")
    for ours in gradients:
        nearest = min(float((ours - other).norm() / other.norm()) for other in expected if other.shape == ours.shape)
        assert nearest < 1e-4


def whole_gradients(source: Path, quantized: Path) -> list[torch.Tensor]:
    """Gradients of the mean divergence by all quantized weights, by transformers and autograd."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(quantized)
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    parameters = dict(student.named_parameters())
    names = [name for name, scheme in checkpoint.schemes().items() if not isinstance(scheme, DenseScheme)]
    with torch.no_grad():
        for name in names:
            parameters[f"{name}.weight"].copy_(checkpoint.weight(name).dequantize())
    tokenizer = open_checkpoint(source).tokenizer()
    windows = calibration_windows(tokenizer, [TEXT], samples=1, seq_len=16, seed=0).windows
    with torch.no_grad():
        expected = teacher(windows).logits.log_softmax(-1)
    kld = (expected.exp() * (expected - student(windows).logits.log_softmax(-1))).sum(-1).mean()
    kld.backward()
    return [gradient for name in names if (gradient := parameters[f"{name}.weight"].grad) is not None]


def test_efforts_decide_what_is_left_out(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    options: dict[str, Any] = {"to": "gptq", "calibration": TEXT, "seq_len": 16, "group_size": 32}
    for name, effort in EFFORTS.items():
        plan = make_plan(
            open_checkpoint(source), ConversionRequest("x", "gptq", tmp_path, effort=name, samples=4, seq_len=16)
        )
        assert {solver.name for solver in plan.solvers.values()} == {effort.solver}
        assert (plan.refine_steps, plan.distill_steps) == (effort.refine_steps, effort.distill_steps)
    result = aphroquant.convert(source, out=tmp_path / "fast", effort="fast", **options)
    record = json.loads((tmp_path / "fast" / "aphroquant.json").read_text())
    assert record["request"]["samples"] == EFFORTS["fast"].samples
    assert record["request"]["effort"] == "fast"
    assert result.solver == EFFORTS["fast"].solver
    eight = ConversionRequest("x", "gptq", tmp_path, effort="best", bits=8, samples=4, seq_len=16)
    assert make_plan(open_checkpoint(source), eight).refine_steps == 0
    with pytest.raises(UsageError, match="unknown effort 'bset'") as caught:
        aphroquant.convert(source, out=tmp_path / "none", effort="bset", **options)
    assert "Did you mean 'best'?" in (caught.value.hint or "")


@pytest.mark.parametrize("option", ["refine_steps", "distill_steps"])
def test_training_that_cannot_be_is_refused_before_the_work(tiny_checkpoint: Tiny, tmp_path: Path, option: str) -> None:
    source = tiny_checkpoint("llama")
    steps: dict[str, Any] = {option: 5}
    with pytest.raises(UsageError, match="but --samples 0 gives none"):
        aphroquant.convert(source, to="gptq", out=tmp_path / "out", solver="rtn", samples=0, **steps)
    with pytest.raises(UsageError, match="has none"):
        aphroquant.convert(source, to="fp8", out=tmp_path / "out", **steps)
    with pytest.raises(UsageError, match="5 does not go with gguf, whose encoders are not trained"):
        aphroquant.convert(source, to="gguf", out=tmp_path / "out", **steps)
    with pytest.raises(UsageError, match=f"{option} = -1 must not be negative"):
        aphroquant.convert(source, to="gptq", out=tmp_path / "out", **{option: -1})


def test_distillation_without_room_is_left_out_with_a_warning(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_memory, "free_memory", lambda device: 10**6)
    result = converted(tiny_checkpoint("llama"), tmp_path / "out", distill_steps=4, solver="rtn")
    assert not result.distillation
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("distillation is left out: it needs 2.1")
    assert result.warnings[0].endswith("memory has 1.00 MB free")
