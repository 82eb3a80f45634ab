"""What is sound has no errors and no warnings; each kind of damage is found, named, and ends with exit code 4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aphroquant
from aphroquant.checkpoint import open_checkpoint
from aphroquant.cli import run
from aphroquant.formats.packing import AWQ_ORDER
from aphroquant.inspection import Finding, verify
from aphroquant.schemes import (
    ActivationScheme,
    AdditiveScheme,
    AffineScheme,
    FloatScheme,
    IntegerScheme,
    LookupScheme,
    Scheme,
)

Make = Callable[..., Path]
ASYMMETRIC, SYMMETRIC = IntegerScheme(4, 32, symmetric=False), IntegerScheme(4, 32, symmetric=True)
DYNAMIC = ActivationScheme("float")
FP8 = FloatScheme("tensor", activations=DYNAMIC)
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"

SOUND: list[tuple[str, Scheme]] = [
    ("awq", ASYMMETRIC),
    ("awq", SYMMETRIC),
    *(("gptq", IntegerScheme(bits, 32, symmetric)) for bits in (2, 3, 4, 8) for symmetric in (False, True)),
    ("auto-round", ASYMMETRIC),
    ("compressed-tensors", ASYMMETRIC),
    ("compressed-tensors", IntegerScheme(8, None, True, activations=ActivationScheme("int"))),
    ("compressed-tensors", FloatScheme("channel", activations=DYNAMIC)),
    ("compressed-tensors", LookupScheme("e2m1", 16, "e4m3")),
    ("compressed-tensors", LookupScheme("e2m1", 32, "e8m0")),
    ("fp8", FP8),
    ("fp8", FloatScheme("block", (128, 128), ActivationScheme("float", granularity="group", group_size=128))),
    ("bitsandbytes", LookupScheme("nf4", 64, "float", flattened=True)),
    ("bitsandbytes", LookupScheme("fp4", 64, "float", flattened=True)),
    ("hqq", AffineScheme(4, 64)),
    ("aqlm", AdditiveScheme(2, 8, 1, 8)),
    ("modelopt", LookupScheme("e2m1", 16, "e4m3")),
]


def found(path: Path, severity: str = "error") -> list[Finding]:
    return [finding for finding in verify(open_checkpoint(path)).findings if finding.severity == severity]


def only(path: Path, severity: str = "error") -> Finding:
    (finding,) = found(path, severity)
    return finding


@pytest.mark.parametrize(("format_name", "scheme"), SOUND, ids=str)
def test_a_sound_checkpoint_of_every_format_raises_no_alarm(quantized: Make, format_name: str, scheme: Scheme) -> None:
    path = quantized(format_name, scheme)
    assert found(path, "error") == []
    assert found(path, "warning") == []
    assert run(["inspect", str(path), "--verify"]) == 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_sound_dense_model_raises_no_alarm(tiny_checkpoint: Make, family: str) -> None:
    path = tiny_checkpoint(family)
    assert found(path, "error") == found(path, "warning") == []
    assert only(path, "info").check == "zero-rows"  # the embedding of the padding token


@pytest.mark.sample_model
def test_the_sample_model_raises_no_alarm(sample_model: Path) -> None:
    assert verify(open_checkpoint(sample_model)).findings == ()


@pytest.mark.parametrize(("size", "types"), [(2e-3, "q6_k"), (4e-3, "q8_0"), (1e-3, "q4_k_m")])
def test_subnormal_scales_that_have_all_the_digits_their_codes_need_raise_no_alarm(
    tiny_checkpoint: Make, damage: Make, tmp_path: Path, size: float, types: str
) -> None:
    source = tiny_checkpoint("llama", hidden_size=256, intermediate_size=256)
    smaller = damage(source, lambda tensors: tensors[f"{UP}.weight"].mul_(size / tensors[f"{UP}.weight"].abs().max()))
    aphroquant.convert(smaller, to="gguf", scheme=types, out=tmp_path / "out.gguf")
    assert found(tmp_path / "out.gguf", "error") == []
    assert "scales-subnormal" not in [finding.check for finding in found(tmp_path / "out.gguf", "warning")]


@pytest.mark.parametrize(("largest", "warns"), [(1e-4, False), (1e-6, True)])
def test_scales_that_have_lost_digits_are_told(quantized: Make, damage: Make, largest: float, warns: bool) -> None:
    """Of 4 bits: float16 has 1e-4/8 to one part in two hundred, and 1e-6/8 to a half."""
    path = damage(
        quantized("gptq", SYMMETRIC),
        lambda tensors: tensors[f"{UP}.scales"].mul_(largest / 8 / tensors[f"{UP}.scales"].float().max()),
    )
    assert ("scales-subnormal" in [finding.check for finding in found(path, "warning")]) is warns


def test_a_scale_that_is_no_number_is_an_error_that_names_file_and_tensor(
    quantized: Make, damage: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damage(quantized("gptq", SYMMETRIC), lambda tensors: tensors[f"{UP}.scales"].view(-1)[5:7].fill_(torch.nan))
    finding = only(path)
    assert (finding.check, finding.subject, finding.file) == ("scales-not-finite", f"{UP}.scales", "model.safetensors")
    assert finding.message == "2 of 256 numbers are NaN or infinite"
    assert run(["inspect", str(path), "--verify"]) == 4
    out, err = capsys.readouterr()
    assert f"{UP}.scales" in out
    assert err.startswith(f"error: {path}: verification found 1 error")


@pytest.mark.parametrize(
    ("format_name", "scheme", "change", "check"),
    [
        ("gptq", ASYMMETRIC, lambda t: t[f"{UP}.scales"].zero_(), "all-zero"),
        ("awq", ASYMMETRIC, lambda t: t[f"{UP}.scales"][0].zero_(), "scales-zero"),
        ("fp8", FP8, lambda t: t[f"{UP}.weight_scale"].neg_(), "scales-negative"),
        ("fp8", FP8, lambda t: t[f"{UP}.weight_scale"].reciprocal_(), "implausible-size"),
        ("fp8", FP8, lambda t: t[f"{UP}.weight"].view(torch.uint8)[3].fill_(0x7F), "weights-not-finite"),
        ("gptq", SYMMETRIC, lambda t: t["model.norm.weight"].zero_(), "norm-near-zero"),
        ("gptq", SYMMETRIC, lambda t: t["model.norm.weight"][0].fill_(torch.inf), "values-not-finite"),
        ("gptq", SYMMETRIC, lambda t: t["lm_head.weight"][0, 0].fill_(torch.nan), "weights-not-finite"),
        ("gptq", SYMMETRIC, lambda t: t.pop("model.norm.weight"), "missing"),
        ("gptq", SYMMETRIC, lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"] + 1}), "unreadable"),
        ("gptq", SYMMETRIC, lambda t: t[f"{UP}.g_idx"][0].fill_(99), "unreadable"),
    ],
)  # fmt: skip
def test_damaged_numbers_are_errors(
    quantized: Make, damage: Make, format_name: str, scheme: Scheme, change: Callable[[Any], Any], check: str
) -> None:
    path = damage(quantized(format_name, scheme), change)
    assert check in [finding.check for finding in found(path)]
    assert run(["inspect", str(path), "--verify"]) == 4


@pytest.mark.parametrize(("written", "label"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_a_wrong_gptq_version_label_is_told_from_the_weights(
    quantized: Make, edit: Make, written: str, label: str
) -> None:
    path = quantized("gptq", ASYMMETRIC, checkpoint_format=written)
    assert found(path) == []
    finding = only(edit(path, quantization={"checkpoint_format": label}))
    assert finding.check == "zero-points-shifted"
    assert ("v1" if written == "gptq" else "v2") in finding.advice


@pytest.mark.parametrize("settings", [{"bits": 8}, {"group_size": 64}, {"bits": 2, "group_size": 128}])
def test_settings_that_the_shapes_contradict_are_told_with_those_that_fit(
    quantized: Make, edit: Make, settings: dict[str, int]
) -> None:
    finding = only(edit(quantized("gptq", SYMMETRIC), quantization=settings))
    assert finding.check == "config-against-shapes"
    assert "bits = 4 and group_size = 32" in finding.advice


def repacked(words: torch.Tensor, order: list[int]) -> torch.Tensor:
    """AWQ words whose nibbles are put into another order."""
    nibbles = torch.stack([words >> 4 * place & 15 for place in range(8)], -1)[..., order]
    packed = torch.zeros_like(words)
    for place in range(8):
        packed |= nibbles[..., place] << 4 * place
    return packed


@pytest.mark.parametrize("order", [list(AWQ_ORDER), [AWQ_ORDER.index(column) for column in range(8)]])
@pytest.mark.parametrize("suffixes", [("qzeros",), ("qweight",)])
def test_nibbles_in_another_order_are_told(
    quantized: Make, damage: Make, order: list[int], suffixes: tuple[str, ...]
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(suffixes):
                tensors[name] = repacked(tensors[name], order)

    path = damage(quantized("awq", ASYMMETRIC), change)
    assert "zero-points-misordered" in [finding.check for finding in found(path)]


def test_table_codes_of_another_table_are_told(quantized: Make, damage: Make) -> None:
    path = quantized("bitsandbytes", LookupScheme("nf4", 64, "float", flattened=True))

    def weaken(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight") and tensor.dtype == torch.uint8:
                tensor.bitwise_and_(0x77).bitwise_or_(0x11)  # no code of -1 or 1 is left

    assert "blocks-without-extreme" in [finding.check for finding in found(damage(path, weaken), "warning")]


def test_unused_codebook_entries_are_counted(quantized: Make, damage: Make) -> None:
    path = quantized("aqlm", AdditiveScheme(1, 8, 1, 8))
    uses = [finding for finding in found(path, "info") if finding.check == "codebook-use"]
    assert len(uses) == 14
    damage(path, lambda tensors: tensors[f"{UP}.codes"].remainder_(10))
    finding = only(path, "warning")
    assert (finding.check, finding.message) == ("codebook-unused", "10 of 256 entries are used (4%)")


def test_layers_that_engines_fuse_must_share_a_scheme(quantized: Make) -> None:
    path = quantized("compressed-tensors", lambda module: ASYMMETRIC if "q_proj" in module else SYMMETRIC)
    assert {finding.check for finding in found(path, "warning")} == {"unfusable"}
    assert run(["inspect", str(path), "--verify"]) == 0


def test_the_same_layer_twice_is_a_warning(tiny_checkpoint: Make, damage: Make, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    damage(path, copied)
    finding = only(path, "warning")
    assert (finding.check, finding.subject) == ("duplicated", Q)


def copied(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.weight"] = tensors[f"{Q.replace('layers.1', 'layers.0')}.weight"].clone()


@pytest.mark.parametrize(("same", "severity"), [(True, "info"), (False, "error")])
def test_a_tied_head_that_is_stored_must_be_the_embedding(
    tiny_checkpoint: Make, damage: Make, edit: Make, tmp_path: Path, same: bool, severity: str
) -> None:
    path = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    edit(path, tie_word_embeddings=True)
    if same:
        damage(path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    checks = [finding.check for finding in found(path, severity)]
    assert ("tied-head-stored" if same else "tied-head-differs") in checks


def test_cache_scales_are_checked(tiny_checkpoint: Make, damage: Make, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    attention = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
    damage(path, lambda tensors: tensors | {f"{attention[0]}.{x}_scale": torch.tensor([0.02]) for x in "kv"})
    assert only(path, "warning").check == "kv-scales-missing"
    damage(path, lambda tensors: tensors | {f"{attention[1]}.{x}_scale": torch.tensor([4e4]) for x in "kv"})
    assert {finding.check for finding in found(path, "warning")} == {"kv-scale-implausible"}
    damage(path, lambda tensors: tensors | {f"{attention[1]}.k_scale": torch.tensor([-1.0])})
    assert only(path).check == "kv-scale-not-positive"


def test_tensors_outside_the_index_and_strange_files_are_told(tiny_checkpoint: Make, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint("llama", max_shard_size="100KB"), tmp_path / "model"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = list(index["weight_map"].values())
    name = next(name for name, file in index["weight_map"].items() if files.count(file) > 1)
    del index["weight_map"][name]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(next(path.glob("model-00002*")), path / "other.safetensors")
    assert (only(path).check, only(path).subject) == ("not-in-index", name)
    assert only(path, "warning").check == "stray-file"


def test_files_are_held_against_the_hashes_of_the_manifest(tiny_checkpoint: Make, tmp_path: Path) -> None:
    import hashlib

    path = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    files = {"model.safetensors": {"sha256": digest}, "config.json": {"sha256": "0" * 64}, "gone.json": digest}
    (path / "aphroquant.json").write_text(json.dumps({"files": files}))
    assert [(finding.check, finding.subject) for finding in found(path)] == [
        ("file-changed", "config.json"),
        ("file-missing", "gone.json"),
    ]


def test_an_unknown_family_is_checked_as_far_as_it_can_be(
    tiny_checkpoint: Make, damage: Make, edit: Make, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    edit(path, model_type="mamba", architectures=None)
    assert "unknown-model" in [finding.check for finding in found(path, "info")]
    assert found(path) == []
    damage(path, lambda tensors: tensors[f"{UP}.weight"][0, 0].fill_(torch.nan))
    assert only(path).check == "weights-not-finite"


def test_the_report_is_json_with_counts_and_findings(
    quantized: Make, damage: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damage(quantized("gptq", SYMMETRIC), lambda tensors: tensors[f"{UP}.scales"][0, 0].fill_(torch.inf))
    assert run(["inspect", str(path), "--verify", "--json", "-"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    assert report["counts"] == {"error": 1, "warning": 0, "info": 1}
    assert set(report["findings"][0]) == {"severity", "check", "subject", "message", "advice", "file"}


def test_a_checkpoint_that_cannot_be_read_ends_with_3(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 7)
    assert run(["inspect", str(tmp_path), "--verify"]) == 3


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "mxfp4"])
def test_a_gguf_file_of_our_own_raises_no_alarm(tiny_checkpoint: Make, tmp_path: Path, kind: str) -> None:
    from aphroquant.conversion import convert

    source = tiny_checkpoint("llama", hidden_size=256, intermediate_size=512, head_dim=64)
    result = convert(source, to="gguf", out=tmp_path / "model.gguf", scheme=kind)
    report = verify(open_checkpoint(result.out))
    assert [finding for finding in report.findings if finding.severity != "info"] == []
