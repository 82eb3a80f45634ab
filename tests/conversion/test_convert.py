"""Whole conversions of tiny models: what is written is what was solved, and all else is carried over."""

from __future__ import annotations

import hashlib
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
from aphroquant.conversion.blocks import SolvedBlock
from aphroquant.errors import InputError, ResourceError, UsageError
from aphroquant.formats import format_class
from aphroquant.models.streamed import StreamedModel
from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, LookupScheme, QuantizedWeight

Tiny = Callable[..., Path]
QUICK: dict[str, Any] = {"samples": 8, "seq_len": 32, "calibration": DEFAULT_TEXTS / "calibration_chat.jsonl"}
FLOAT_COMBINATIONS = [("fp8", f"fp8-{kind}") for kind in ("dynamic", "static", "block")]
COMBINATIONS = [
    *[
        (to, None, solver)
        for to in ("awq", "gptq", "compressed-tensors")
        for solver in ("rtn", "gptq", "awq", "awq-gptq")
    ],
    *[(to, scheme, None) for to, scheme in FLOAT_COMBINATIONS],
    *[("compressed-tensors", scheme, None) for _, scheme in FLOAT_COMBINATIONS],
    ("compressed-tensors", "w8a16", None),
    ("compressed-tensors", "w8a8-int8", "gptq"),
    ("gptq", "w3a16", None),
    ("aqlm", "2x5", None),
]


def converted(source: Path, out: Path, **options: Any) -> ConversionResult:
    return aphroquant.convert(source, out=out, **{**QUICK, **options})


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[str, QuantizedWeight]:
    """Collects what the solvers produce on the way to the writer."""
    weights: dict[str, QuantizedWeight] = {}

    from aphroquant.conversion.directory_run import DirectoryConversion

    take = DirectoryConversion.take

    def watched(self: DirectoryConversion, block: SolvedBlock) -> None:
        weights.update({name: solution.weight for name, solution in block.solutions.items()})
        take(self, block)

    monkeypatch.setattr(DirectoryConversion, "take", watched)
    return weights


@pytest.mark.parametrize(("to", "scheme", "solver"), COMBINATIONS)
def test_the_written_checkpoint_holds_what_the_solver_produced(
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    solved: dict[str, QuantizedWeight],
    to: str,
    scheme: str | None,
    solver: str | None,
) -> None:
    source = tiny_checkpoint("llama")
    result = converted(source, tmp_path / "out", to=to, scheme=scheme, solver=solver)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format_name == to
    assert set(solved) == set(checkpoint.spec.modules())
    for module, weight in solved.items():
        stored = checkpoint.weight(module)
        assert stored.scheme == weight.scheme
        assert torch.equal(stored.dequantize(), weight.dequantize()), module
    assert result.num_modules == 14
    assert result.num_bytes == checkpoint.num_bytes
    assert 0 < (result.mean_relative_error or 0) < 0.1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_converts_and_still_computes_nearly_the_same(
    tiny_checkpoint: Tiny, tmp_path: Path, family: str
) -> None:
    source = tiny_checkpoint(family)
    converted(source, tmp_path / "out", to="gptq", bits=8, solver="awq-gptq")
    windows = torch.randint(0, 300, (2, 24))
    logits = []
    for path in (source, tmp_path / "out"):
        model = StreamedModel(open_checkpoint(path))
        logits.append(model.logits(model.hidden_states(windows).flatten(0, 1)))
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.03


def test_what_is_not_quantized_is_carried_byte_for_byte(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen2", torch_dtype="bfloat16")
    converted(source, tmp_path / "out", to="compressed-tensors", solver="gptq", ignore=["o_proj"])
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    quantized = {name for name, scheme in after.schemes().items() if not isinstance(scheme, DenseScheme)}
    assert len(quantized) == 12
    for name in before.tensors:
        if name.removesuffix(".weight") not in quantized:
            assert torch.equal(before.read(name).view(torch.int16), after.read(name).view(torch.int16)), name
    for path in before.carried_files():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert after.config == before.config


def test_scales_of_bfloat16_models_are_bfloat16_in_compressed_tensors_and_float16_elsewhere(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama", torch_dtype="bfloat16")
    for to, dtype in (("compressed-tensors", torch.bfloat16), ("awq", torch.float16)):
        converted(source, tmp_path / to, to=to, solver="rtn", samples=0)
        weight = open_checkpoint(tmp_path / to).weight("model.layers.0.self_attn.q_proj")
        assert weight["scales"].dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bitsandbytes_computes_in_the_model_s_dtype(tiny_checkpoint: Tiny, tmp_path: Path, dtype: str) -> None:
    aphroquant.convert(tiny_checkpoint("llama", torch_dtype=dtype), to="bitsandbytes", out=tmp_path / "out")
    assert quantization_config(tmp_path / "out")["bnb_4bit_compute_dtype"] == dtype


def test_the_dtype_of_a_model_whose_config_has_none_is_that_of_its_numbers(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama", torch_dtype="float16")
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (source / "config.json").write_text(json.dumps(config))
    aphroquant.convert(source, to="bitsandbytes", out=tmp_path / "out")
    assert quantization_config(tmp_path / "out")["bnb_4bit_compute_dtype"] == "float16"


def quantization_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def test_awq_changes_norms_and_nothing_else_that_is_dense(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", torch_dtype="float16")
    converted(source, tmp_path / "out", to="awq", solver="awq")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    changed = [name for name in after.dense_names() if not torch.equal(before.read(name), after.read(name))]
    assert changed
    assert all(name.endswith("layernorm.weight") for name in changed)
    assert all(after.tensors[name].dtype == before.tensors[name].dtype for name in after.dense_names())


def test_tied_embeddings_stay_tied(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    converted(tiny_checkpoint("llama", tie_word_embeddings=True), tmp_path / "out", to="gptq", solver="rtn", samples=0)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config["tie_word_embeddings"] is True
    assert not checkpoint.has("lm_head.weight")


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_the_same_seed_gives_the_same_bytes(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        converted(source, tmp_path / name, to="gptq", seed=seed)
        files = digests(tmp_path / name)
        for name_of_output in ("aphroquant.json", "README.md", "SHA256SUMS"):  # which hold its name, or times
            del files[name_of_output]
        record = json.loads((tmp_path / name / "aphroquant.json").read_text())
        found.append((files, {key: record[key] for key in ("request", "calibration", "result")}))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


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


def test_static_fp8_scales_cover_the_greatest_input(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    converted(tiny_checkpoint("llama"), tmp_path / "out", to="fp8", scheme="fp8-static")
    checkpoint = open_checkpoint(tmp_path / "out")
    scales = [float(checkpoint.weight(module)["input_scale"]) for module in checkpoint.spec.modules()]
    assert all(0 < scale < 1 for scale in scales)
    assert scales[0] == scales[1] == scales[2]  # q, k and v read the same input
    assert isinstance(checkpoint.schemes()["model.layers.0.mlp.up_proj"], FloatScheme)


@pytest.mark.parametrize(
    ("to", "scheme"), [("awq", None), ("gptq", None), ("fp8", "fp8-block"), ("compressed-tensors", "w8a8-int8")]
)
def test_a_dry_run_writes_nothing_and_foretells_the_size(
    tiny_checkpoint: Tiny, tmp_path: Path, to: str, scheme: str | None
) -> None:
    options: dict[str, Any] = {"to": to, "scheme": scheme, "samples": 0}
    told = converted(tiny_checkpoint("llama"), tmp_path / "out", dry_run=True, **options)
    assert not list(tmp_path.iterdir())
    assert told.dry_run
    made = converted(tiny_checkpoint("llama"), tmp_path / "out", **options)
    assert told.num_bytes == made.num_bytes == open_checkpoint(tmp_path / "out").num_bytes
    assert told.bits_per_weight == made.bits_per_weight


def test_the_manifest_tells_how_it_was_made(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Words and more words, one after the other. " * 100)
    converted(tiny_checkpoint("llama"), tmp_path / "out", to="gptq", calibration=text, seed=5)
    record = json.loads((tmp_path / "out" / "aphroquant.json").read_text())
    assert record["request"]["seed"] == 5
    assert record["calibration"]["sources"][0]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert record["calibration"]["windows"] == [8, 32]
    module = record["result"]["modules"]["model.layers.0.self_attn.q_proj"]
    assert module["damping"] > 0
    assert module["proxy_loss"] > 0
    assert set(record["result"]["scaling"]["model.layers.0"]) == {"qkv", "o", "gate_up", "down"}
    assert record["timings"]["seconds"] > 0


def test_calibrated_solvers_beat_plain_rounding_on_the_layers_outputs(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    errors = {
        solver: converted(
            tiny_checkpoint("llama"), tmp_path / solver, to="gptq", bits=3, solver=solver
        ).mean_relative_error
        for solver in ("rtn", "gptq", "awq-gptq")
    }
    assert (errors["gptq"] or 1) < (errors["rtn"] or 0)
    assert (errors["awq-gptq"] or 1) < (errors["rtn"] or 0)


def test_hidden_states_in_a_file_give_the_same_result(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted(tiny_checkpoint("llama"), tmp_path / "memory", to="awq")
    from aphroquant.conversion import activations, blocks, source_pass

    original = activations.Activations

    def spilling(num_tokens: int, width: int, **limits: Any) -> Any:
        return original(num_tokens, width, memory_limit=0)

    for module in (activations, blocks, source_pass):
        monkeypatch.setattr(module, "Activations", spilling)
    result = converted(tiny_checkpoint("llama"), tmp_path / "file", to="awq")
    assert "temporary file" in result.notes[0]
    name = "model.safetensors"
    assert digests(tmp_path / "memory")[name] == digests(tmp_path / "file")[name]


def test_a_full_directory_is_refused_before_any_work(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="exists and is not empty"):
        converted(tiny_checkpoint("llama"), tmp_path / "out", to="awq", dry_run=True)
    converted(tiny_checkpoint("llama"), tmp_path / "out", to="awq", solver="rtn", samples=0, overwrite=True)
    assert open_checkpoint(tmp_path / "out").format_name == "awq"


def test_a_small_disk_is_found_before_any_work(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match=r"the output needs \d+\.\d\d kB, but the disk has 1\.00 kB free"):
        converted(tiny_checkpoint("llama"), tmp_path / "out", to="awq")


def test_a_target_in_capitals_suggests_its_name(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown format 'AWQ'") as raised:
        converted(tiny_checkpoint("llama"), tmp_path / "out", to="AWQ")
    assert raised.value.hint is not None
    assert "Did you mean 'awq'?" in raised.value.hint
    assert "exl3" not in raised.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf2"}, "unknown format"),
        ({"to": "exl3"}, "exl3 can be read, but not written"),
        ({"to": "mxfp4"}, "mxfp4 only takes over numbers that the source already has"),
        (
            {"to": "aqlm", "solver": "gptq"},
            "solver gptq makes integer codes and .*FP8, not additive 2x8 g8",
        ),
        ({"to": "awq", "solver": "aqlm"}, "solver aqlm makes sums of codebook vectors"),
        ({"to": "aqlm", "samples": 0}, "solver aqlm needs calibration"),
        ({"to": "aqlm", "scheme": "1x20"}, "at most 16 bits"),
        ({"to": "awq", "group_size": 48}, "must be divisible by group_size = 48"),
        ({"to": "awq", "seq_len": 1000}, "longer than the model's context of 512"),
        ({"to": "awq", "ignore": ["nothing"]}, "--ignore nothing matches no module"),
        ({"to": "awq", "ignore": ["*_proj"]}, "nothing is left to quantize"),
        ({"to": "fp8", "scheme": "fp8-static", "samples": 0}, "need calibration, but samples = 0"),
    ],
)
def test_mistakes_are_found_before_any_work(
    tiny_checkpoint: Tiny, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("*_", r"\*_")):
        converted(tiny_checkpoint("llama"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("samples", [0, 8])
def test_a_damaged_weight_is_named_and_no_output_is_left(tiny_checkpoint: Tiny, tmp_path: Path, samples: int) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint("llama"), damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        converted(damaged, tmp_path / "out", to="awq", solver="rtn", samples=samples)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"damaged", ".out.job"} if samples else {"damaged"})


def test_one_pattern_need_not_be_a_list(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    result = converted(tiny_checkpoint("llama"), tmp_path / "out", to="fp8", ignore="o_proj", dry_run=True)
    assert result.num_modules == 12


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


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1e-30, UsageError, r"mlp\.up_proj: scales\[2, 1\] = .*e-31 is below the range of float16"),
        (1e30, UsageError, r"mlp\.up_proj: scales\[2, 1\] = 1\.0.*e\+30 is beyond the largest float16"),
        (float("nan"), InputError, r"model\.layers\.1\.mlp\.up_proj holds NaN or infinite values"),
    ],
)
def test_a_dry_run_looks_at_every_scale(
    value: float, error: type[Exception], message: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama", torch_dtype="bfloat16")
    converted(source, tmp_path / "one", to="compressed-tensors", samples=0, solver="rtn", group_size=32)
    file = tmp_path / "one" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight_scale"][2, 1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        aphroquant.convert(tmp_path / "one", to="awq", out=tmp_path / "out", dry_run=True)


@pytest.mark.parametrize("scheme", ["f16", "q8_0"])
def test_bitsandbytes_of_a_gguf_file_has_one_dense_dtype(scheme: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """transformers leaves dense tensors as they are stored, and a float32 norm does not multiply a float16 head."""
    source = tiny_checkpoint("llama", hidden_size=256, intermediate_size=512)
    aphroquant.convert(source, to="gguf", scheme=scheme, out=tmp_path / "m.gguf")
    options: dict[str, Any] = {"to": "bitsandbytes", "requantize": True, "samples": 0, "solver": "rtn"}
    told = aphroquant.convert(tmp_path / "m.gguf", out=tmp_path / "out", dry_run=True, **options)
    made = aphroquant.convert(tmp_path / "m.gguf", out=tmp_path / "out", **options)
    found, before = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "m.gguf")
    assert {found.info(name).dtype for name in found.dense_names()} == {torch.float32}
    assert torch.equal(found.read("lm_head.weight"), before.read("lm_head.weight").float())
    assert told.num_bytes == made.num_bytes == found.num_bytes


def test_a_dry_run_computes_scales_that_a_format_stores_otherwise(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """bitsandbytes keeps 127 scales in one number, so that few of its scales are float16 numbers."""
    aphroquant.convert(tiny_checkpoint("llama", torch_dtype="float16"), to="bitsandbytes", out=tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.SCB"][3] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"up_proj: scales\[3\] = 0\.00787.* is between two numbers of float16"):
        aphroquant.convert(tmp_path / "one", to="gptq", out=tmp_path / "out", dry_run=True)


@pytest.mark.parametrize(("hidden_size", "noted"), [(96, True), (128, False)])
def test_blocks_cut_short_by_the_edge_of_a_layer_are_told(
    tiny_checkpoint: Tiny, tmp_path: Path, hidden_size: int, noted: bool
) -> None:
    widths = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 128}
    source = tiny_checkpoint("llama", hidden_size=hidden_size, **widths)
    result = converted(source, tmp_path / "out", to="fp8", scheme="fp8-block", dry_run=True)
    assert any("no whole number of blocks" in note for note in result.notes) == noted


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
