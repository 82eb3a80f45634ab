"""The sample model, a quantized GGUF file, as a source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import aphroquant
from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import UsageError
from aphroquant.schemes import IntegerScheme

pytestmark = pytest.mark.sample_model


def test_its_hidden_size_refuses_groups_of_128_and_says_what_fits(sample_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        aphroquant.convert(sample_model, to="awq", out=tmp_path / "out", group_size=128, requantize=True, dry_run=True)
    assert "in_features = 576 must be divisible by group_size = 128" in caught.value.message
    assert "32, 64, 96, 192" in (caught.value.hint or "")


def test_it_becomes_a_checkpoint_with_a_float16_embedding_float32_norms_and_its_tokenizer(
    sample_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = aphroquant.convert(sample_model, to="gptq", out=out, solver="rtn", samples=0, requantize=True)
    assert result.mode == "requantize"
    made, source = open_checkpoint(out), open_checkpoint(sample_model)
    assert result.num_bytes == made.num_bytes
    assert made.tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert made.tensors["model.norm.weight"].dtype == torch.float32
    assert torch.equal(made.read("model.norm.weight"), source.read("model.norm.weight"))
    assert not made.has("lm_head.weight")
    module = "model.layers.7.self_attn.k_proj"
    assert made.schemes()[module] == IntegerScheme(4, 64, False)
    exact, rounded = source.weight(module).dequantize(), made.weight(module).dequantize()
    assert float((exact - rounded).norm() / exact.norm()) < 0.12
    text = "In 2026, 3 + 4 = 7."
    assert made.tokenizer()(text)["input_ids"] == source.tokenizer()(text)["input_ids"]
    assert made.tokenizer().chat_template == source.tokenizer().chat_template
