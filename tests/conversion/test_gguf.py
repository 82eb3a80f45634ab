"""`convert --to gguf`: numbers that a file can hold stay, others are encoded; the file is whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS, calibration_windows
from aphroquant.checkpoint import GgufTensorPlan, GgufWriter, open_checkpoint
from aphroquant.conversion import ConversionResult
from aphroquant.conversion.job.job import Job
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.walk import Walk
from aphroquant.errors import InputError, UsageError
from aphroquant.formats.gguf import block_type, quantize
from aphroquant.schemes import DenseScheme

Tiny = Callable[..., Path]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
DOWN = "model.layers.0.mlp.down_proj"


def converted(source: Path, out: Path, **options: Any) -> ConversionResult:
    return aphroquant.convert(source, to="gguf", out=out, **options)


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("scheme", "layers", "logits"),
    [
        ("q4_0", "Q4_0", "Q6_K"),
        ("q4_1", "Q4_1", "Q6_K"),
        ("q5_0", "Q5_0", "Q6_K"),
        ("q5_1", "Q5_1", "Q6_K"),
        ("Q8_0", "Q8_0", "Q8_0"),
        ("q2_k", "Q2_K", "Q6_K"),
        ("q3_k", "Q3_K", "Q6_K"),
        ("q4_k", "Q4_K", "Q6_K"),
        ("q5_k", "Q5_K", "Q6_K"),
        ("q6_k", "Q6_K", "Q6_K"),
        ("iq4_nl", "IQ4_NL", "Q6_K"),
        ("mxfp4", "MXFP4", "Q6_K"),
        ("f16", "F16", "F16"),
        ("bf16", "BF16", "BF16"),
        ("f32", "F32", "F32"),
    ],
)
def test_every_type_is_written_by_its_name(
    scheme: str, layers: str, logits: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama", **WIDE)
    result = converted(source, tmp_path / "a.gguf", scheme=scheme)
    assert (result.mode, result.outcome) == ("quantize", "quantized from a dense source")
    found, original = open_checkpoint(tmp_path / "a.gguf"), open_checkpoint(source)
    types = types_in(tmp_path / "a.gguf")
    assert {types[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_v", "ffn_down")} == {layers}
    assert types["output.weight"] == logits
    assert types["blk.0.attn_norm.weight"] == "F32"
    expected = quantize(block_type(layers), original.read(f"{DOWN}.weight"))
    assert torch.equal(found.weight(DOWN).dequantize(), expected.dequantize())
    assert result.num_bytes == found.num_bytes
    assert found.tokenizer().chat_template == original.tokenizer().chat_template


@pytest.mark.parametrize(("mix", "base"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")])
def test_mixes_raise_the_first_and_last_eighth_of_the_blocks_and_every_third_between(
    mix: str, base: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 16, "num_key_value_heads": 4}
    converted(tiny_checkpoint("llama", **sizes), tmp_path / "a.gguf", scheme=mix)
    types = types_in(tmp_path / "a.gguf")
    for name in ("attn_v", "ffn_down"):
        raised = [layer for layer in range(16) if types[f"blk.{layer}.{name}.weight"] == "Q6_K"]
        assert raised == [0, 1, 4, 7, 10, 13, 14, 15]
    others = {types[f"blk.{layer}.{name}.weight"] for layer in range(16) for name in ("attn_q", "attn_k", "ffn_up")}
    assert others == {base, types["token_embd.weight"]} == {base}
    assert types["output.weight"] == "Q6_K"


def test_an_embedding_that_makes_the_logits_has_six_bits(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    converted(tiny_checkpoint("llama", tie_word_embeddings=True, **WIDE), tmp_path / "a.gguf", scheme="q4_k")
    assert types_in(tmp_path / "a.gguf")["token_embd.weight"] == "Q6_K"


def test_rows_that_are_no_whole_super_blocks_get_the_stand_in_and_it_says_so(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    result = converted(tiny_checkpoint("llama"), tmp_path / "a.gguf", bits=4)
    assert types_in(tmp_path / "a.gguf")["blk.0.attn_q.weight"] == "Q5_0"
    assert any("their rows are no whole blocks" in note for note in result.notes)


SOURCES: list[tuple[str, dict[str, Any], str]] = [
    ("gptq", {"bits": 4, "group_size": 32, "symmetric": True}, "Q4_0"),
    ("gptq", {"bits": 4, "group_size": -1, "symmetric": True}, "Q4_0"),
    ("gptq", {"bits": 8, "group_size": 32, "symmetric": True}, "Q8_0"),
    ("gptq", {"bits": 2, "group_size": 32, "symmetric": False}, "Q4_0"),
    ("awq", {"symmetric": False}, "Q5_0"),
    ("compressed-tensors", {"scheme": "w8a8-int8"}, "Q8_0"),
]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("first", "options", "kind"), SOURCES)
def test_integers_of_other_formats_stay_what_they_are(
    family: str, first: str, options: dict[str, Any], kind: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, torch_dtype="float16")
    aphroquant.convert(source, to=first, out=tmp_path / "one", samples=0, solver="rtn", **options)
    result = converted(tmp_path / "one", tmp_path / "two.gguf")
    assert result.mode == "repack"
    assert result.outcome == "lossless: every one of 14 layers dequantizes to the same bits"
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two.gguf")
    assert types_in(tmp_path / "two.gguf")["blk.0.attn_q.weight"] == kind
    for module, scheme in one.schemes().items():
        before, after = one.weight(module), two.weight(module)
        assert torch.equal(before.dequantize().view(torch.int32), after.dequantize().view(torch.int32)), module
        if isinstance(scheme, DenseScheme):
            assert two.schemes()[module] == scheme


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k_m", "q5_k", "q6_k", "iq4_nl"])
def test_gguf_to_gguf_is_the_same_file_but_for_its_name(kind: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    converted(tiny_checkpoint("llama", **WIDE), tmp_path / "one.gguf", scheme=kind)
    result = converted(tmp_path / "one.gguf", tmp_path / "two.gguf")
    assert result.mode == "repack"
    one, two = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("one", "two"))
    assert list(one.fields) == list(two.fields)
    for key, field in one.fields.items():
        assert field.types == two.fields[key].types
        assert field.contents() == two.fields[key].contents(), key
    assert [t.name for t in one.tensors] == [t.name for t in two.tensors]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(one.tensors, two.tensors, strict=True))


def test_metadata_that_means_nothing_here_is_carried_along(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint("llama"))
    kept = {"general.license": "apache-2.0", "general.tags": ["a", "b"], "llama.custom": 3, "tokenizer.odd": 0.5}
    with GgufWriter(tmp_path / "one.gguf", source.config, source.tokenizer(), metadata=kept) as writer:
        writer.plan({name: GgufTensorPlan(info.shape, "F32") for name, info in source.tensors.items()})
        for name in source.tensors:
            writer.add(name, source.read(name))
        writer.finish()
    converted(tmp_path / "one.gguf", tmp_path / "two.gguf", scheme="q8_0")
    found = open_checkpoint(tmp_path / "two.gguf").metadata  # type: ignore[attr-defined]
    assert {key: found[key] for key in kept} == kept
    assert found["general.file_type"] == 7


def test_a_scheme_that_the_numbers_already_are_is_no_reason_for_a_loss(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", torch_dtype="float16")
    aphroquant.convert(source, to="gptq", out=tmp_path / "one", samples=0, solver="rtn", group_size=32, symmetric=True)
    assert converted(tmp_path / "one", tmp_path / "a.gguf", scheme="q4_0").mode == "repack"
    unrounded = converted(tmp_path / "one", tmp_path / "b.gguf", scheme="f32")
    assert unrounded.outcome.startswith("lossless")
    one, b = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "b.gguf")
    assert torch.equal(one.weight(DOWN).dequantize(), b.weight(DOWN).dequantize())


@pytest.mark.parametrize(
    ("made", "options", "reason"),
    [
        ({"to": "gptq"}, {"scheme": "q6_k"}, "--scheme q6_k asks for others than the int4 asym g64"),
        ({"to": "gptq"}, {"bits": 5}, "--bits 5 asks for others than the int4 asym g64"),
        ({"to": "fp8"}, {}, "GGUF has no type for fp8 per tensor"),
        (
            {"to": "gptq", "bits": 8},
            {},
            "GGUF holds at most 8 bits with zero points exactly, and int8 asym g64 needs 9",
        ),
        ({"to": "gptq", "group_size": 16}, {}, "groups of 16 cut through it"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_unless_a_loss_is_allowed(
    made: dict[str, Any], options: dict[str, Any], reason: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    aphroquant.convert(tiny_checkpoint("llama"), out=tmp_path / "one", samples=0, **made)
    with pytest.raises(UsageError) as caught:
        converted(tmp_path / "one", tmp_path / "a.gguf", **options)
    assert reason in caught.value.message
    assert "--requantize" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    result = converted(tmp_path / "one", tmp_path / "a.gguf", requantize=True, **options)
    assert result.mode == "requantize"
    assert reason in result.outcome
    assert (result.weight_relative_error or 1) < 0.02


@pytest.mark.parametrize("name", ["q4_k_m", "q6_k", "q4_0"])
def test_a_file_of_the_types_asked_for_stays_as_it_is(name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Also where its head has another type."""
    converted(tiny_checkpoint("llama", **WIDE), tmp_path / "one.gguf", scheme=name)
    assert converted(tmp_path / "one.gguf", tmp_path / "two.gguf", scheme=name).mode == "repack"
    with pytest.raises(UsageError, match="--scheme q5_0 asks for others than the"):
        converted(tmp_path / "one.gguf", tmp_path / "three.gguf", scheme="q5_0")


def test_a_scale_beyond_float16_deep_in_the_model_is_a_loss_too(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", torch_dtype="bfloat16")
    aphroquant.convert(source, to="compressed-tensors", out=tmp_path / "one", samples=0, solver="rtn", group_size=32)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale"][2, 1] = 1e-30
    save_file(tensors, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"model\.layers\.1\.mlp\.up_proj.*scales\[2, 1\] = .* is below the range of float16"
    ):
        converted(tmp_path / "one", tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert converted(tmp_path / "one", tmp_path / "a.gguf", requantize=True).mode == "requantize"


def test_a_directory_gets_a_file_named_after_the_model_and_its_types(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint("llama", **WIDE), tmp_path / "My-Model-F16"))
    result = converted(source, tmp_path / "made" / "here", scheme="q5_k_m")
    path = tmp_path / "made" / "here" / "My-Model-Q5_K_M.gguf"
    assert result.out == str(path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "My-Model-Q5_K_M.gguf",
        f"{path.name}.aphroquant.json",
        f"{path.name}.sha256",
        "README.md",
    ]
    record = json.loads((path.parent / f"{path.name}.aphroquant.json").read_text())
    assert record["result"]["scheme"] == "Q5_K_M"
    assert record["result"]["modules"][DOWN] == {"type": "Q6_K"}


def test_an_existing_file_stays_without_overwrite(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=r"a\.gguf exists"):
            converted(tiny_checkpoint("llama"), tmp_path / "a.gguf", dry_run=dry_run)
    assert (tmp_path / "a.gguf").read_text() == "mine"
    converted(tiny_checkpoint("llama"), tmp_path / "a.gguf", overwrite=True)
    assert open_checkpoint(tmp_path / "a.gguf").spec.num_layers == 2
    with pytest.raises(UsageError, match=r"is the source .*, which a conversion leaves as it is"):
        converted(tmp_path / "a.gguf", tmp_path / "a.gguf", overwrite=True)


def test_a_dry_run_foretells_the_size_and_writes_nothing(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", **WIDE)
    told = converted(source, tmp_path / "out", bits=4, dry_run=True)
    assert not list(tmp_path.iterdir())
    made = converted(source, tmp_path / "out", bits=4)
    assert (told.num_bytes, told.bits_per_weight) == (made.num_bytes, made.bits_per_weight)


def importance_of(source: Path, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """E[x**2] of every layer's inputs."""
    walk = Walk(open_checkpoint(source), windows, [], torch.device("cpu"), Progress(), Job(), observes=True)
    walk.run()
    return {module: found.mean_square for module, found in walk.statistics.items()}


def test_the_importance_of_a_column_is_the_mean_square_of_what_transformers_feeds_it(tiny_checkpoint: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint("qwen3")
    windows = torch.randint(0, 300, (3, 24))
    found = importance_of(source, windows)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    expected: dict[str, torch.Tensor] = {}
    for module in found:
        model.get_submodule(module).register_forward_hook(
            lambda _, inputs, __, module=module: expected.update({module: inputs[0].flatten(0, 1).square().mean(0)})
        )
    with torch.no_grad():
        model(windows)
    assert set(found) == set(open_checkpoint(source).spec.modules()) == set(expected)
    for module, square in found.items():
        assert torch.allclose(square.double(), expected[module], rtol=1e-4), module


def test_calibration_text_weighs_the_errors(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", **WIDE)
    text = {"calibration": DEFAULT_TEXTS / "calibration_chat.jsonl", "samples": 16, "seq_len": 64}
    converted(source, tmp_path / "plain.gguf", scheme="q2_k")
    converted(source, tmp_path / "weighed.gguf", scheme="q2_k", **text)
    record = json.loads((tmp_path / "weighed.gguf.aphroquant.json").read_text())
    assert record["calibration"]["windows"] == [16, 64]
    original = open_checkpoint(source)
    data = calibration_windows(original.tokenizer(), (text["calibration"],), samples=16, seq_len=64, seed=0)
    importance = importance_of(source, data.windows)
    files = [open_checkpoint(tmp_path / f"{name}.gguf") for name in ("weighed", "plain")]
    for module, square in importance.items():
        exact = original.read(f"{module}.weight")
        errors = [float(((made.weight(module).dequantize() - exact).square() * square).sum()) for made in files]
        assert errors[0] < errors[1], module


def test_what_gguf_has_no_place_for_is_left_out_and_said(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["mtp.head.weight"] = torch.ones(3, 5)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = converted(source, tmp_path / "a.gguf", scheme="q8_0")
    assert result.warnings == (
        "1 tensors are left out, for which llama.cpp's model has no place: mtp.head.weight and so on",
    )
    assert "1 scales of the KV cache are left out: GGUF has no place for them" in result.notes


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"scheme": "q4_k_x"}, "gguf has no scheme 'q4_k_x'", "Did you mean 'q4_k"),
        ({"bits": 7}, "gguf has types of 2, 3, 4, 5, 6 or 8 bits, not of 7", "--scheme takes"),
        ({"group_size": 64}, "--group-size does not go with gguf", "--scheme takes"),
        ({"symmetric": False}, "--symmetric does not go with gguf", "--scheme takes"),
        ({"solver": "gptq"}, "--solver gptq does not go with gguf", "leave it out"),
        ({"bits": 4, "scheme": "q6_k"}, "--bits 4 does not go with --scheme q6_k", None),
        ({"ignore": ["nothing"]}, "--ignore nothing matches no module", None),
    ],
)
def test_mistakes_are_found_before_any_work(
    options: dict[str, Any], message: str, hint: str | None, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        converted(tiny_checkpoint("llama"), tmp_path / "a.gguf", **options)
    assert message in caught.value.message
    assert (hint or "") in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


def test_ignored_modules_stay_in_their_own_dtype(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", torch_dtype="bfloat16")
    converted(source, tmp_path / "a.gguf", scheme="q8_0", ignore=["down_proj", "lm_head"])
    types = types_in(tmp_path / "a.gguf")
    assert types["blk.1.ffn_down.weight"] == types["output.weight"] == "BF16"
    assert types["blk.1.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_tokenizer_that_cannot_be_rebuilt_is_found_before_any_work(
    dry_run: bool, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_checkpoint("llama"))
    converted(source.path, tmp_path / "one.gguf", scheme="q4_0")
    content = (tmp_path / "one.gguf").read_bytes()
    key = b"tokenizer.ggml.merges"
    assert content.count(key) == 1
    (tmp_path / "one.gguf").write_bytes(content.replace(key, b"tokenizer.ggml.mergez"))
    with pytest.raises(InputError, match=r"one\.gguf: tokenizer\.ggml\.merges is missing"):
        aphroquant.convert(tmp_path / "one.gguf", to="gptq", out=tmp_path / "new" / "out", dry_run=dry_run)
    assert not (tmp_path / "new").exists()
