"""Solvers that know more than a layer's own inputs: the source's states, and the gradients of its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import following
from aphroquant.conversion.activations import Activations
from aphroquant.conversion.calibration_block import load_calibration_block
from aphroquant.conversion.following import SourceFollower
from aphroquant.conversion.source_pass import SourcePass, embedded
from aphroquant.errors import UsageError
from aphroquant.evaluation import evaluate

Tiny = Callable[..., Path]
TEXT = DEFAULT_TEXTS / "calibration_chat.jsonl"
QUICK: dict[str, Any] = {"to": "gptq", "bits": 2, "group_size": 32, "samples": 48, "seq_len": 32, "calibration": TEXT}
LIMIT = 1 << 30


def divergence(source: Path, out: Path, **options: Any) -> float:
    aphroquant.convert(source, out=out, **{**QUICK, **options})
    return evaluate(out, against=source, windows=16, window_len=32).mean_kld


@pytest.mark.parametrize(("family", "solver"), [("llama", "awq-gptaq"), ("qwen2", "awq-gptaq"), ("llama", "awq-yaqa")])
def test_the_divergence_is_below_that_of_awq_and_gptq(
    family: str, solver: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    plain = divergence(source, tmp_path / "plain", solver="awq-gptq")
    assert divergence(source, tmp_path / "out", solver=solver) < plain


def test_the_followed_states_are_the_sources(tiny_checkpoint: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    windows = torch.randint(0, 360, (4, 16))
    own, followed = (embedded(checkpoint, windows, memory_limit=LIMIT) for _ in range(2))
    source = SourcePass(own, 16, observes=False, memory_limit=LIMIT)
    follower = SourceFollower(followed, 16, set(), LIMIT, torch.device("cpu"))
    for layer in range(2):
        block = load_calibration_block(checkpoint, layer, 16)
        source.step(block)
        for norm, names, last in (
            ("input_layernorm", ("self_attn.q_proj",), "self_attn.o_proj"),
            ("post_attention_layernorm", ("mlp.up_proj",), "mlp.down_proj"),
        ):
            follower.correct_first(block, norm, names, None, followed.rows)
            for linear in block.linears.values():
                linear.weight = linear.weight + 0.1  # what rounding does to them is not followed
            follower.correct_last(block, norm, last, None, followed.rows, torch.empty(0))
            block = load_calibration_block(checkpoint, layer, 16)
    assert torch.allclose(follower.states, source.states, atol=1e-5)


def test_a_few_windows_are_followed_of_many(tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "FOLLOWED_TOKENS", 64)
    hidden = Activations(10 * 16, 8, memory_limit=0)  # in a file
    hidden.rows.copy_(torch.randn(160, 8))
    follower = SourceFollower(hidden, 16, set(), LIMIT, torch.device("cpu"))
    expected = hidden.rows.view(10, 16, 8)[[0, 2, 5, 7]].flatten(0, 1)
    assert torch.equal(follower.states, expected)


def test_experts_are_passed_and_layers_around_them_corrected(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", num_local_experts=4)
    assert divergence(source, tmp_path / "out", solver="awq-gptaq", bits=4) < 0.5


def test_feedback_between_outputs_is_refused_for_experts(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="solver awq-yaqa knows nothing of experts"):
        aphroquant.convert(
            tiny_checkpoint("mixtral", num_local_experts=4), out=tmp_path / "out", **QUICK, solver="awq-yaqa"
        )


@pytest.mark.parametrize("solver", ["awq-gptaq", "awq-yaqa"])
def test_the_same_seed_gives_the_same_bytes(solver: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        options = QUICK | {"samples": 4, "bits": 4}
        aphroquant.convert(tiny_checkpoint("llama"), out=tmp_path / name, solver=solver, **options)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
