"""Sources that are quantized already: kept bit for bit where the target can hold them, quantized anew only if asked."""

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
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import ConversionResult
from aphroquant.errors import UsageError
from aphroquant.formats import format_class
from aphroquant.schemes import DenseScheme, IntegerScheme, LookupScheme, QuantizedWeight

Tiny = Callable[..., Path]
QUICK: dict[str, Any] = {"samples": 8, "seq_len": 32, "calibration": DEFAULT_TEXTS / "calibration_chat.jsonl"}


def converted(source: Path, out: Path, **options: Any) -> ConversionResult:
    return aphroquant.convert(source, out=out, **{**QUICK, **options})


@pytest.mark.parametrize("first", ["awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("second", ["awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_formats_that_hold_the_same_numbers_are_repacked_bit_for_bit(
    tiny_checkpoint: Tiny, tmp_path: Path, first: str, second: str, symmetric: bool
) -> None:
    source = tiny_checkpoint("llama", torch_dtype="float16")
    converted(source, tmp_path / "one", to=first, solver="rtn", samples=0, symmetric=symmetric or None)
    foretold = aphroquant.convert(tmp_path / "one", to=second, out=tmp_path / "two", dry_run=True)
    assert foretold.outcome == "would be lossless by headers and scales: 14 layers keep their numbers"
    result = aphroquant.convert(tmp_path / "one", to=second, out=tmp_path / "two")
    assert result.mode == "repack"
    assert result.solver is None
    assert result.outcome == "lossless: every one of 14 layers dequantizes to the same bits"
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two")
    assert two.format_name == second
    assert result.num_bytes == two.num_bytes
    for module, scheme in one.schemes().items():
        assert two.schemes()[module] == scheme
        assert torch.equal(one.weight(module).dequantize(), two.weight(module).dequantize())


def test_asking_for_the_numbers_that_the_source_has_is_no_reason_to_quantize_anew(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    converted(tiny_checkpoint("llama"), tmp_path / "one", to="awq", solver="rtn", samples=0)
    same: dict[str, Any] = {"bits": 4, "group_size": 64, "symmetric": False}
    for requantize in (False, True):  # which allows a loss, and asks for none
        result = aphroquant.convert(tmp_path / "one", to="gptq", out=tmp_path / f"two{requantize}", **same)
        assert result.mode == "repack"
    others: list[dict[str, Any]] = [{"bits": 3}, {"group_size": 32}, {"symmetric": True}, {"solver": "rtn"}]
    for other in others:
        options = {**same, **other, "dry_run": True}
        with pytest.raises(UsageError, match="asks for others than the int4 asym g64 that it has") as caught:
            aphroquant.convert(tmp_path / "one", to="gptq", out=tmp_path / "three", **options)
        assert "--requantize" in (caught.value.hint or "")
        told = converted(tmp_path / "one", tmp_path / "three", to="gptq", requantize=True, **options)
        assert told.mode == "requantize", other


def test_what_a_target_cannot_hold_is_quantized_anew_only_if_asked_and_it_says_so(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    converted(tiny_checkpoint("llama"), tmp_path / "one", to="awq", solver="rtn", samples=0)
    with pytest.raises(UsageError, match=r"one is quantized already, and .* in fp8: .* fp8 holds 8-bit floats, not"):
        aphroquant.convert(tmp_path / "one", to="fp8", out=tmp_path / "two")
    assert not (tmp_path / "two").exists()
    result = aphroquant.convert(tmp_path / "one", to="fp8", out=tmp_path / "two", requantize=True, samples=0)
    assert result.mode == "requantize"
    assert result.outcome.startswith("requantized, because model.layers.0.mlp.down_proj: fp8 holds 8-bit floats")
    record = json.loads((tmp_path / "two" / "aphroquant.json").read_text())
    assert record["result"]["outcome"] == result.outcome
    assert record["request"]["requantize"] is True
    asked = converted(tmp_path / "one", tmp_path / "three", to="awq", group_size=32, solver="rtn", requantize=True)
    assert asked.mode == "requantize"
    module = "model.layers.1.mlp.down_proj"
    assert open_checkpoint(tmp_path / "three").schemes()[module] == IntegerScheme(4, 32, False)


def test_nothing_stays_of_the_sources_own_quantization(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    converted(tiny_checkpoint("llama"), tmp_path / "one", to="gptq", samples=0)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps({**config, "compression_config": {"format": "dense"}}))
    (tmp_path / "one" / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))
    aphroquant.convert(tmp_path / "one", to="awq", out=tmp_path / "two")
    written = json.loads((tmp_path / "two" / "config.json").read_text())
    assert "compression_config" not in written
    assert written["quantization_config"]["quant_method"] == "awq"
    assert not (tmp_path / "two" / "quantize_config.json").exists()


@pytest.mark.parametrize("target", ["compressed-tensors", "auto-round", "hqq", "gptq"])
def test_a_quantized_head_stays_quantized(target: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source, head = with_quantized_head(tiny_checkpoint, tmp_path / "one")
    assert aphroquant.convert(source, to=target, out=tmp_path / "two").mode == "repack"
    found = open_checkpoint(tmp_path / "two").weight("lm_head")
    assert not isinstance(found.scheme, DenseScheme)
    assert torch.equal(found.dequantize(), head.dequantize())


def test_a_quantized_head_becomes_dense_without_loss_where_the_readers_expect_that(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source, head = with_quantized_head(tiny_checkpoint, tmp_path / "one")
    result = aphroquant.convert(source, to="awq", out=tmp_path / "two")
    assert result.outcome == "lossless: every one of 14 layers dequantizes to the same bits"
    assert "lm_head.weight, which awq keeps dense, in float32, which holds every bit" in result.notes
    assert torch.equal(open_checkpoint(tmp_path / "two").read("lm_head.weight"), head.dequantize())


@pytest.mark.parametrize("solver", ["rtn", None])
def test_a_quantized_head_is_carried_dense_when_all_else_is_quantized_anew(
    solver: str | None, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source, head = with_quantized_head(tiny_checkpoint, tmp_path / "one")
    options: dict[str, Any] = {"bits": 8, "solver": solver} if solver else {"scheme": "fp8-dynamic"}
    target = "gptq" if solver else "fp8"
    aphroquant.convert(source, to=target, out=tmp_path / "two", requantize=True, samples=0, **options)
    assert torch.equal(open_checkpoint(tmp_path / "two").read("lm_head.weight"), head.dequantize(torch.float16))


def test_four_bit_modules_left_out_are_carried_in_their_shape(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """bitsandbytes stores a column of bytes, of which the matrix's shape does not follow."""
    source = tiny_checkpoint("llama", torch_dtype="float16")
    write_four_bits(source, tmp_path / "one")
    aphroquant.convert(tmp_path / "one", to="fp8", out=tmp_path / "two", requantize=True, ignore=["o_proj"])
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two")
    module = "model.layers.0.self_attn.o_proj"
    assert torch.equal(two.read(f"{module}.weight"), one.weight(module).dequantize(torch.float16))


def write_four_bits(source: Path, out: Path) -> None:
    """The checkpoint with random NF4 numbers in its layers."""
    shutil.copytree(source, out)
    opened, tensors, weights = open_checkpoint(source), load_file(source / "model.safetensors"), {}
    for module in opened.spec.modules():
        rows, columns = tensors.pop(f"{module}.weight").shape
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        values = {"codes": codes, "scales": torch.rand(rows * columns // 64)}
        weights[module] = QuantizedWeight(LookupScheme("nf4", 64, "float", flattened=True), values, (rows, columns))
    target = format_class("bitsandbytes").for_schemes({name: held.scheme for name, held in weights.items()}, [])
    for module, weight in weights.items():
        tensors |= {f"{module}.{name}": tensor for name, tensor in target.write(module, weight).items()}
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text()) | {"quantization_config": target.quantization_config()}
    (out / "config.json").write_text(json.dumps(config))


def with_quantized_head(tiny_checkpoint: Tiny, source: Path) -> tuple[Path, QuantizedWeight]:
    """A GPTQ checkpoint whose head is quantized too, and that head."""
    converted(tiny_checkpoint("llama"), source, to="gptq", bits=4, group_size=32, samples=0, symmetric=True)
    tensors = load_file(source / "model.safetensors")
    head = QuantizedWeight(
        IntegerScheme(4, 32, True),
        {
            "codes": torch.randint(0, 16, tensors["lm_head.weight"].shape, dtype=torch.uint8),
            "scales": torch.rand(tensors["lm_head.weight"].shape[0], tensors["lm_head.weight"].shape[1] // 32).half(),
        },
        tuple(tensors.pop("lm_head.weight").shape),
    )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["lm_head"] = True
    stored = format_class("gptq").from_config(config["quantization_config"]).write("lm_head", head)
    save_file(tensors | {f"lm_head.{name}": tensor for name, tensor in stored.items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    return source, head
