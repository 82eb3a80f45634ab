"""Scales of a quantized KV cache go along, and the target's config says that they do."""

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
from aphroquant import convert
from aphroquant.calibration.data import calibration_windows
from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import UsageError
from aphroquant.formats.kv_scales import kv_scales

Tiny = Callable[..., Path]
PER_HEAD = {"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": False, "symmetric": True}


@pytest.fixture
def source(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A model with cache scales."""
    source = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    for layer in (0, 1):
        for which in ("k", "v"):
            tensors[f"model.layers.{layer}.self_attn.{which}_scale"] = torch.tensor([0.25 + layer])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def written(source: Path, to: str, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    out = source.parent / to
    aphroquant.convert(source, to=to, out=out, samples=0, **options)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return config, load_file(out / "model.safetensors")


@pytest.mark.parametrize("to", ["awq", "gptq", "fp8", "compressed-tensors"])
def test_the_scales_are_carried(source: Path, to: str) -> None:
    _, tensors = written(source, to)
    assert tensors["model.layers.1.self_attn.v_scale"].tolist() == [1.25]


def test_compressed_tensors_describes_them(source: Path) -> None:
    scheme = written(source, "compressed-tensors")[0]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")


def test_incomplete_scales_are_not_announced(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_scale"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert written(source, "compressed-tensors")[0]["kv_cache_scheme"] is None


@pytest.mark.parametrize("options", [{}, {"bits": 8}], ids=["repacked", "quantized anew"])
def test_the_sources_own_description_is_kept(source: Path, options: dict[str, Any]) -> None:
    written(source, "compressed-tensors")
    first = source.parent / "compressed-tensors"
    config = json.loads((first / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = PER_HEAD
    (first / "config.json").write_text(json.dumps(config))
    again = source.parent / "again"
    aphroquant.convert(first, to="compressed-tensors", out=again, samples=0, requantize=True, **options)
    assert json.loads((again / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] == PER_HEAD


SCALED = "model.layers.0.self_attn"


def respelled(source: Path, names: dict[str, str | None], **config: Any) -> None:
    """Rename the cache scales of `source` (None: remove), and change its quantization_config."""
    tensors = load_file(source / "model.safetensors")
    for layer in (0, 1):
        for old, new in names.items():
            tensor = tensors.pop(f"model.layers.{layer}.self_attn.{old}")
            if new is not None:
                tensors[f"model.layers.{layer}.self_attn.{new}"] = tensor
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spelling",
    ["attn.{}_scale", "{}_proj.{}_scale", "qkv_proj.{}_scale", "{}_cache.scale", "{}.scale", "{}_proj.output_scale"],
)
@pytest.mark.parametrize("to", ["compressed-tensors", "fp8", "modelopt"])
def test_every_spelling_becomes_the_targets_own(source: Path, spelling: str, to: str) -> None:
    respelled(source, {f"{which}_scale": spelling.replace("{}", which) for which in ("k", "v")})
    _, tensors = written(source, to, **({"scheme": "fp8-dynamic"} if to == "modelopt" else {}))
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(SCALED) and tensor.numel() == 1}
    expected = "{}_proj.{}_scale" if to == "modelopt" else "{}_scale"
    names = {f"{SCALED}.{expected.replace('{}', which)}" for which in ("k", "v")}
    assert names <= set(found)
    assert not any(name.endswith(("output_scale", "cache.scale", ".k.scale")) for name in tensors)
    assert {tensor.shape for name, tensor in found.items() if name in names} == {() if to == "modelopt" else (1,)}
    assert all(float(found[name]) == 0.25 for name in names)


def test_one_scale_for_both_becomes_two(source: Path) -> None:
    respelled(source, {"k_scale": "kv_scale", "v_scale": None})
    _, tensors = written(source, "compressed-tensors")
    assert tensors[f"{SCALED}.k_scale"].tolist() == tensors[f"{SCALED}.v_scale"].tolist() == [0.25]
    assert f"{SCALED}.kv_scale" not in tensors


def test_of_two_spellings_the_one_that_counts_is_kept_and_it_says_so(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[f"{SCALED}.k_proj.output_scale"] = torch.tensor(9.0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = aphroquant.convert(source, to="fp8", out=source.parent / "fp8")
    assert any(
        "k_proj.output_scale is left out: the same scale is stored under another name" in n for n in result.notes
    )
    assert load_file(source.parent / "fp8" / "model.safetensors")[f"{SCALED}.k_scale"].tolist() == [0.25]


def test_modelopt_says_that_there_are_scales_in_both_of_its_files(source: Path) -> None:
    config, _ = written(source, "modelopt", scheme="fp8-dynamic")
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    settings = json.loads((source.parent / "modelopt" / "hf_quant_config.json").read_text())
    assert settings["quantization"]["kv_cache_quant_algo"] == "FP8"


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4", "INT8", "FP8_CAST"])
def test_modelopt_to_modelopt_keeps_the_algorithm_of_the_cache(source: Path, algorithm: str) -> None:
    respelled(source, {"k_scale": None, "v_scale": None})  # a cache may need none
    written(source, "modelopt", scheme="fp8-dynamic")
    first = source.parent / "modelopt"
    settings = json.loads((first / "hf_quant_config.json").read_text())
    settings["quantization"]["kv_cache_quant_algo"] = algorithm
    (first / "hf_quant_config.json").write_text(json.dumps(settings))
    aphroquant.convert(first, to="modelopt", out=source.parent / "again")
    again = json.loads((source.parent / "again" / "hf_quant_config.json").read_text())
    assert again["quantization"]["kv_cache_quant_algo"] == algorithm
    aphroquant.convert(first, to="compressed-tensors", out=source.parent / "ct")
    config = json.loads((source.parent / "ct" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] is None  # no scales are stored


@pytest.mark.parametrize(("to", "scheme"), [("compressed-tensors", "fp8-dynamic"), ("modelopt", "nvfp4")])
def test_new_scales_cover_the_keys_and_values_of_the_calibration_text(
    tiny_checkpoint: Tiny, tmp_path: Path, to: str, scheme: str
) -> None:
    """Against the cache that transformers fills with the same windows."""
    from transformers import AutoModelForCausalLM

    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    solver = None if scheme.startswith("fp8") else "gptq"  # which leaves the channels of values as large as they are
    convert(source, to=to, out=out, scheme=scheme, solver=solver, samples=4, seq_len=32, kv_scales=True)
    windows = calibration_windows(open_checkpoint(source).tokenizer(), (), samples=4, seq_len=32, seed=0).windows
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_pretrained(source)(windows, use_cache=True).past_key_values
    stored = open_checkpoint(out)
    tolerance = 1e-4 if scheme.startswith("fp8") else 0.1  # of four bits, keys and values are those that it has made
    for layer, own in enumerate(cache.layers):
        found = kv_scales(f"model.layers.{layer}.self_attn", stored.tensors, stored.read, num_kv_heads=2)
        for scale, seen in ((found.key, own.keys), (found.value, own.values)):
            assert scale is not None
            assert float(scale) * 448 == pytest.approx(float(seen.abs().max()), rel=tolerance)
    assert stored.format is not None
    assert stored.format.cache_scheme() is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gptq"}, "readers of gptq look for no scales"),
        ({"to": "gguf"}, "--kv-scales does not go with gguf"),
        ({"to": "compressed-tensors", "samples": 0}, "--kv-scales needs calibration"),
    ],
)
def test_scales_that_cannot_be_found_or_stored_are_refused(
    tiny_checkpoint: Tiny, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        convert(tiny_checkpoint("llama"), out=tmp_path / "out", kv_scales=True, **options)
    assert not list(tmp_path.iterdir())


def test_a_source_with_scales_of_its_own_keeps_them(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    first = tmp_path / "first"
    convert(tiny_checkpoint("llama"), to="fp8", out=first, samples=2, seq_len=32, kv_scales=True)
    with pytest.raises(UsageError, match="is quantized already and is only repacked"):
        convert(first, to="fp8", out=tmp_path / "second", kv_scales=True)
    with pytest.raises(UsageError, match=r"has scales of its own, model\.layers\.0\.self_attn\.k_scale among them"):
        convert(first, to="fp8", scheme="fp8-block", out=tmp_path / "second", kv_scales=True, requantize=True)
