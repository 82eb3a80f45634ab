"""What is not quantized arrives byte for byte: tensors that no decoder knows, and the files beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import aphroquant

Tiny = Callable[..., Path]
FILES = {
    "preprocessor_config.json": '{"size": 224}',
    "video_preprocessor_config.json": "{}",
    "generation_config.json": '{ "temperature": 0.6 }\n',
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "LICENSE.txt": "do as you like",
}
LEFT = {"modeling_evil.py": "raise SystemExit", "pytorch_model.bin": "x", "additional_chat_templates/run.py": "x"}


@pytest.fixture
def source(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A model with an MTP head, a vision tower and odd dtypes beside its layers, and with more files."""
    source = Path(shutil.copytree(tiny_checkpoint("llama", torch_dtype="bfloat16"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors |= {
        "model.mtp.layers.0.self_attn.q_proj.weight": torch.randn(6, 10).bfloat16(),
        "model.mtp.layers.0.norm.weight": torch.tensor([1.0, -0.0, 3e38]),
        "visual.patch_embed.proj.weight": torch.randn(4, 3, 2, 2).half(),
        "visual.blocks.0.attn.qkv.weight": torch.randn(5, 7),
        "visual.scalar": torch.tensor(7, dtype=torch.int64),
        "visual.mask": torch.tensor([True, False, True]),
        "visual.empty": torch.empty(0, 4),
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for name, content in (FILES | LEFT).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    return source


def assert_carried(source: Path, out: Path) -> None:
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    kept = [name for name in before if "mtp" in name or "visual" in name or "norm" in name or "embed_tokens" in name]
    assert len(kept) == 13
    for name in kept:
        assert (before[name].dtype, before[name].shape) == (after[name].dtype, after[name].shape)
        ours, theirs = (tensors[name].reshape(-1).view(torch.uint8) for tensors in (before, after))
        assert torch.equal(ours, theirs), name
    for name in FILES:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not any((out / name).exists() for name in LEFT)


@pytest.mark.parametrize("to", ["awq", "gptq", "fp8", "compressed-tensors", "hqq", "auto-round", "modelopt"])
def test_quantizing_carries_everything_else(source: Path, tmp_path: Path, to: str) -> None:
    options: dict[str, Any] = {"scheme": "fp8-dynamic"} if to == "modelopt" else {}
    aphroquant.convert(source, to=to, out=tmp_path / "out", samples=0, **options)
    assert_carried(source, tmp_path / "out")


@pytest.mark.parametrize("to", ["awq", "gptq", "compressed-tensors", "hqq"])
def test_repacking_carries_everything_else(source: Path, tmp_path: Path, to: str) -> None:
    aphroquant.convert(source, to="gptq", out=tmp_path / "one", samples=0, solver="rtn", group_size=32)
    aphroquant.convert(tmp_path / "one", to=to, out=tmp_path / "two")
    assert_carried(source, tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == original


def test_the_sources_own_settings_of_quantization_are_not_carried(source: Path, tmp_path: Path) -> None:
    aphroquant.convert(source, to="modelopt", out=tmp_path / "one", samples=0, scheme="fp8-dynamic")
    (tmp_path / "one" / "quantize_config.json").write_text("{}")
    aphroquant.convert(tmp_path / "one", to="compressed-tensors", out=tmp_path / "two")
    assert not (tmp_path / "two" / "hf_quant_config.json").exists()
    assert not (tmp_path / "two" / "quantize_config.json").exists()
