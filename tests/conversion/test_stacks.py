"""`convert --to mxfp4`: experts that stand alone in the source are entries of common tensors in the target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import aphroquant
from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import UsageError

EXPERTS, HIDDEN, INNER = 3, 64, 96
STACK = "model.layers.{}.mlp.experts.{}_proj"


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    """Two layers of random experts in gpt-oss's layout, with what surrounds them."""
    folder = tmp_path / "gpt-oss"
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": torch.randn(32, HIDDEN).bfloat16(), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(2):
        for name, rows, columns in (("gate_up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER)):
            stack = STACK.format(layer, name)
            blocks = (EXPERTS, rows, columns // 32, 16)
            tensors[f"{stack}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8)
            tensors[f"{stack}_scales"] = torch.randint(100, 130, blocks[:3], dtype=torch.uint8)
            tensors[f"{stack}_bias"] = torch.randn(EXPERTS, rows).bfloat16()
        tensors[f"model.layers.{layer}.mlp.router.weight"] = torch.randn(EXPERTS, HIDDEN).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_experts_leave_their_stacks_and_come_back_byte_for_byte(gpt_oss: Path, tmp_path: Path) -> None:
    there = aphroquant.convert(gpt_oss, to="compressed-tensors", out=tmp_path / "single")
    assert there.outcome == "lossless: every one of 12 layers dequantizes to the same bits"
    single = load_file(tmp_path / "single" / "model.safetensors")
    assert single["model.layers.1.mlp.experts.2.down_proj.weight_packed"].shape == (HIDDEN, INNER // 2)
    back = aphroquant.convert(tmp_path / "single", to="mxfp4", out=tmp_path / "stacked")
    assert back.outcome == there.outcome
    before, after = (load_file(folder / "model.safetensors") for folder in (gpt_oss, tmp_path / "stacked"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert back.num_bytes == open_checkpoint(tmp_path / "stacked").num_bytes


def test_a_layer_that_lacks_an_expert_is_refused(gpt_oss: Path, tmp_path: Path) -> None:
    aphroquant.convert(gpt_oss, to="compressed-tensors", out=tmp_path / "single")
    tensors = load_file(tmp_path / "single" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".1.mlp.experts.1.down_proj." not in name}
    save_file(kept, tmp_path / "single" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"expert 1 of model\.layers\.1\.mlp\.experts\.down_proj is not quantized"):
        aphroquant.convert(tmp_path / "single", to="mxfp4", out=tmp_path / "stacked")


def test_other_layers_than_experts_have_no_place(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    aphroquant.convert(source, to="gguf", out=tmp_path / "a.gguf", scheme="mxfp4")
    with pytest.raises(UsageError, match=r"q_proj: mxfp4 holds experts of gpt-oss") as caught:
        aphroquant.convert(tmp_path / "a.gguf", to="mxfp4", out=tmp_path / "out", requantize=True)
    assert "but not mxfp4" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
