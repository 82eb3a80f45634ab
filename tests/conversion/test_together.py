"""Several outputs from one pass: each is what it would be alone, and none is left behind by an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import walk
from aphroquant.conversion.blocks import CalibratedSolver
from aphroquant.conversion.calibration_block import CalibrationBlock, load_calibration_block
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.run import convert_all
from aphroquant.errors import InputError, UsageError

Tiny = Callable[..., Path]
TEXT = {"calibration": (DEFAULT_TEXTS / "calibration_chat.jsonl",), "samples": 8, "seq_len": 32}
WIDE = {"hidden_size": 256, "intermediate_size": 512}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PACKED = {"to": "compressed-tensors", "group_size": 32, "symmetric": False}
FOUR: dict[str, dict[str, Any]] = {
    "awq": {"to": "awq", "group_size": 32},
    "gptq": {"to": "gptq", "group_size": 32},
    "static": {"to": "fp8", "scheme": "fp8-static"},
    "model.gguf": {"to": "gguf", "scheme": "q4_k_m"},
}


def request(source: Path, out: Path, **options: Any) -> ConversionRequest:
    return ConversionRequest(str(source), out=out, **{**TEXT, **options})


def bytes_of(path: Path) -> dict[str, bytes]:
    """What was written, by name; of the manifest what repeats."""
    files = [path, Path(f"{path}.aphroquant.json")] if path.is_file() else sorted(path.iterdir())
    return {file.name: _repeating(file) for file in files if file.name != "SHA256SUMS"}  # of the manifest too


def _repeating(file: Path) -> bytes:
    if not file.name.endswith("aphroquant.json"):
        return file.read_bytes()
    record = json.loads(file.read_text())
    return json.dumps({key: value for key, value in record.items() if key != "timings"}).encode()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_outputs_of_one_pass_are_those_of_separate_conversions(
    tiny_checkpoint: Tiny, tmp_path: Path, family: str
) -> None:
    source = tiny_checkpoint(family, **(WIDE if family == "llama" else EXPERTS))
    chosen = dict(FOUR)
    if family == "mixtral":
        chosen = {"static": {"to": "compressed-tensors", "scheme": "fp8-static"}, "packed": PACKED}
    convert_all([request(source, tmp_path / "together" / name, **options) for name, options in chosen.items()])
    for name, options in chosen.items():
        convert_all([request(source, tmp_path / "alone" / name, **options)])
        assert bytes_of(tmp_path / "together" / name) == bytes_of(tmp_path / "alone" / name), name


def test_each_block_is_loaded_once_and_equal_numbers_are_solved_once(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, loaded, solved = tiny_checkpoint("llama", **WIDE), [], []
    load, solve = walk.load_calibration_block, CalibratedSolver.solve

    def loading(checkpoint: Any, layer: int, *rest: Any) -> CalibrationBlock:
        loaded.append(layer)
        return load(checkpoint, layer, *rest)

    def solving(self: CalibratedSolver, block: CalibrationBlock) -> Any:
        solved.append(block.block.layer)
        return solve(self, block)

    monkeypatch.setattr(walk, "load_calibration_block", loading)
    monkeypatch.setattr(CalibratedSolver, "solve", solving)
    rounded = {"to": "gptq", "bits": 3, "group_size": 32}
    options = {**FOUR, "packed": PACKED, "three": rounded}
    convert_all([request(source, tmp_path / name, **each) for name, each in options.items()])
    assert loaded == [0, 1]
    assert solved == [0, 0, 1, 1]  # once for 4 bits in three formats, once for 3 bits
    checkpoints = [open_checkpoint(tmp_path / name) for name in ("awq", "gptq", "packed")]
    for module in checkpoints[0].spec.modules():
        first, *others = [checkpoint.weight(module) for checkpoint in checkpoints]
        assert all(other.same_values(first) for other in others), module


def test_a_block_is_the_same_for_every_branch(tiny_checkpoint: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("qwen2"))
    block = load_calibration_block(checkpoint, 0, 8)
    before = {name: linear.weight.clone() for name, linear in block.linears.items()}
    copy = block.copy()
    for linear in copy.linears.values():
        linear.weight = linear.weight * 2
    copy.norms["input_layernorm"] = copy.norms["input_layernorm"] * 2
    hidden = torch.randn(8, checkpoint.spec.hidden_size)
    again = load_calibration_block(checkpoint, 0, 8)
    assert torch.equal(block.forward(hidden), again.forward(hidden))
    assert all(torch.equal(block.linears[name].weight, weight) for name, weight in before.items())
    assert not torch.equal(copy.forward(hidden), block.forward(hidden))


def test_an_error_in_one_output_leaves_none(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aphroquant.conversion.gguf_run import GgufConversion

    def broken(self: GgufConversion, importance: Any) -> None:
        raise InputError("broken")

    monkeypatch.setattr(GgufConversion, "_write_tensors", broken)
    source = tiny_checkpoint("llama", **WIDE)
    with pytest.raises(InputError, match="broken"):
        convert_all([request(source, tmp_path / name, **options) for name, options in FOUR.items()])
    assert [path.name for path in tmp_path.iterdir()] == [".awq.job"]  # to go on from


def test_outputs_in_each_others_place_are_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", **WIDE)
    for second in ("out", "out/model.gguf"):
        options = {"to": "gguf"} if second.endswith("gguf") else {"to": "gptq"}
        with pytest.raises(UsageError, match="in each other's place"):
            convert_all([request(source, tmp_path / "out", to="awq"), request(source, tmp_path / second, **options)])
    assert not list(tmp_path.iterdir())


def test_outputs_of_one_pass_share_their_calibration(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    requests = [request(source, tmp_path / "a", to="awq"), request(source, tmp_path / "b", to="gptq", seed=1)]
    with pytest.raises(UsageError, match="share their calibration text, samples, seq_len, seed and device"):
        convert_all(requests)
    free = request(source, tmp_path / "b", to="fp8", samples=0)
    assert [result.to for result in convert_all([requests[0], free])] == ["awq", "fp8"]
