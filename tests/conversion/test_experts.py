"""Models whose blocks have experts: each expert is solved on its own tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aphroquant import convert
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import walk
from aphroquant.conversion.activations import Activations
from aphroquant.conversion.blocks import CalibratedSolver
from aphroquant.conversion.experts import RoutedTokens
from aphroquant.conversion.source_pass import embedded
from aphroquant.errors import UsageError
from aphroquant.models.loader import load_block
from aphroquant.models.streamed import StreamedModel
from aphroquant.schemes import DenseScheme

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "head_dim": 32},
}


def converted(source: Path, out: Path, **options: Any) -> Any:
    defaults = {"to": "compressed-tensors", "bits": 4, "group_size": 32, "samples": 4, "seq_len": 32, "device": "cpu"}
    defaults["calibration"] = DEFAULT_TEXTS / "calibration_chat.jsonl"
    return convert(source, out=out, **defaults | options)


@pytest.mark.parametrize(("family", "solver"), [("mixtral", "awq-gptq"), ("qwen3_moe", "rtn")])
def test_all_experts_are_quantized_and_no_router(
    tiny_checkpoint: Tiny, tmp_path: Path, family: str, solver: str
) -> None:
    source = tiny_checkpoint(family, **FAMILIES[family])
    converted(source, tmp_path / "out", bits=8, solver=solver, samples=2)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    quantized = {name for name, scheme in after.schemes().items() if not isinstance(scheme, DenseScheme)}
    assert quantized == set(after.spec.modules())
    assert after.spec.experts is not None
    for layer in range(2):
        router = f"{after.spec.block_prefix(layer)}.{after.spec.experts.router}.weight"
        assert torch.equal(after.read(router), before.read(router))
    windows = torch.randint(0, 300, (2, 24))
    logits = []
    for checkpoint in (before, after):
        model = StreamedModel(checkpoint)
        logits.append(model.logits(model.hidden_states(windows).flatten(0, 1)))
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.05


def test_gptq_is_better_on_each_experts_own_tokens(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", **FAMILIES["mixtral"])
    errors = [
        converted(source, tmp_path / solver, solver=solver, samples=16).mean_relative_error
        for solver in ("rtn", "gptq")
    ]
    assert errors[1] < 0.75 * errors[0]


def test_experts_with_few_tokens_are_solved_on_all_and_reported(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe", **FAMILIES["qwen3_moe"] | {"num_experts": 32, "num_experts_per_tok": 1})
    result = converted(source, tmp_path / "out", solver="gptq", samples=4)
    few = [warning for warning in result.warnings if "experts got fewer than 64 calibration tokens" in warning]
    assert len(few) == 2, "one sentence a block"
    report = json.loads((tmp_path / "out" / "aphroquant.json").read_text())
    modules = report["result"]["modules"]
    experts = {name: entry for name, entry in modules.items() if ".experts." in name}
    assert len(experts) == 2 * 32 * 3
    for entry in experts.values():
        assert entry["calibrated_on"] == ("own" if entry["tokens"] >= 64 else "all tokens")
        assert entry["relative_error"] < 0.1
    for layer in range(2):
        gates = [f"model.layers.{layer}.mlp.experts.{expert}.gate_proj" for expert in range(32)]
        assert sum(experts[name]["tokens"] for name in gates) == 128


def test_statistics_of_an_expert_are_those_of_its_tokens(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 sums over the tokens that transformers' router would choose."""
    block = load_block(open_checkpoint(tiny_checkpoint("mixtral", **FAMILIES["mixtral"])), 0)
    inputs = Activations(500, 64, memory_limit=1 << 30)
    inputs.rows.copy_(torch.randn(500, 64))
    routed = RoutedTokens(block, inputs, CPU)
    assert block.router is not None
    shares = torch.softmax(block.router(inputs.rows), -1)
    chosen = shares.topk(2)
    for expert in range(4):
        expected = (chosen.indices == expert).any(1).nonzero()[:, 0]
        assert torch.equal(routed.tokens(expert, 64).sort().values, expected)
        assert routed.count(expert) == len(expected)
        uses = list(routed.uses(expert))
        tokens, weights = (torch.cat(parts) for parts in zip(*uses, strict=True))
        scaled = chosen.values / chosen.values.sum(1, keepdim=True)
        picked = torch.where(chosen.indices == expert, scaled, 0).sum(1)[tokens]
        torch.testing.assert_close(weights, picked)
        assert torch.equal(torch.cat(list(routed.inputs(tokens))), inputs.rows[tokens])
    assert len(routed.tokens(0, 501)) == 500


def test_solved_blocks_compute_what_the_next_block_reads(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states behind all blocks are those of the written model."""
    kept: dict[str, CalibratedSolver] = {}
    solve = CalibratedSolver.solve

    def watched(self: CalibratedSolver, block: Any) -> Any:
        kept["solver"] = self
        return solve(self, block)

    monkeypatch.setattr(CalibratedSolver, "solve", watched)
    windows: list[torch.Tensor] = []

    def noting(checkpoint: Any, given: torch.Tensor, **options: Any) -> Any:
        windows.append(given)
        return embedded(checkpoint, given, **options)

    monkeypatch.setattr(walk, "embedded", noting)
    source = tiny_checkpoint("mixtral", **FAMILIES["mixtral"])
    converted(source, tmp_path / "out", solver="gptq")
    model = StreamedModel(open_checkpoint(tmp_path / "out"))
    expected = model.hidden_states(windows[0]).flatten(0, 1)
    from aphroquant.models.decoder import rms_norm
    from aphroquant.models.loader import load_final_norm

    hidden = kept["solver"]._hidden.rows
    found = rms_norm(hidden, load_final_norm(model.checkpoint), model.spec.norm_eps)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_training_a_model_with_experts_is_refused_before_any_work(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", **FAMILIES["mixtral"])
    with pytest.raises(UsageError, match="--refine-steps trains no model whose blocks have experts"):
        converted(source, tmp_path / "out", refine_steps=2)
    assert not (tmp_path / "out").exists()
