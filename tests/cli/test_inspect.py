import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.checkpoint.inspection import layer_ranges, role
from aphroquant.cli import run
from aphroquant.formats import format_class
from aphroquant.schemes import IntegerScheme, QuantizedWeight

Tiny = Callable[..., Path]


@pytest.fixture
def model(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A directory to damage."""
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))


def report(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["inspect", str(path), "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> None:
    file = path / "model.safetensors"
    safetensors.torch.save_file(dict(change(safetensors.torch.load_file(file))), file, {"format": "pt"})


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def quantized(source: Path, target: Path, format_name: str, scheme: IntegerScheme, skip: str = "-") -> Path:
    """The checkpoint with random codes in its linears, those whose names hold `skip` left dense."""
    checkpoint = open_checkpoint(source)
    modules = [module for module in checkpoint.spec.modules() if skip not in module]
    dense = [module for module in checkpoint.schemes() if module not in modules]
    written = format_class(format_name).for_schemes(dict.fromkeys(modules, scheme), dense)
    with CheckpointWriter(target) as writer:
        for name in checkpoint.tensors:
            module = name.removesuffix(".weight")
            if module not in modules:
                writer.add(name, checkpoint.read(name))
                continue
            rows, columns = checkpoint.info(name).shape
            groups = (rows, scheme.num_groups(columns))
            tensors = {
                "codes": torch.randint(0, 2**scheme.bits, (rows, columns), dtype=torch.uint8),
                "scales": torch.rand(groups).half() + 0.5,
                "zeros": torch.randint(0, 2**scheme.bits, groups, dtype=torch.uint8),
            }
            weight = QuantizedWeight(scheme, tensors, (rows, columns))
            for suffix, tensor in written.write(module, weight).items():
                writer.add(f"{module}.{suffix}", tensor)
        for file in checkpoint.carried_files():
            writer.add_file(file)
        return writer.finish(checkpoint.config | {"quantization_config": written.quantization_config()})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_sound_model_has_no_problems(family: str, tiny_checkpoint: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(tiny_checkpoint(family), capsys)
    assert found["problems"] == []
    assert found["format"] == "dense"
    assert found["family"] == family
    assert found["bits_per_weight"] == found["linear_bits_per_weight"] == 32
    names = [row["role"] for row in found["modules"]]
    assert len(names) == len(set(names)) == 9
    up = next(row for row in found["modules"] if row["role"] == "model.layers.*.mlp.up_proj")
    assert (up["layers"], up["count"], up["scheme"], up["shape"]) == ("0-1", 2, "float32", [128, 64])
    stored = sum(row["num_bytes"] for row in [*found["modules"], *found["others"]])
    assert stored == found["num_bytes"] == found["num_parameters"] * 4


@pytest.mark.parametrize("format_name", ["awq", "gptq", "compressed-tensors"])
def test_a_quantized_models_schemes_and_bits_are_told(
    format_name: str, tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = quantized(tiny_checkpoint("qwen2"), tmp_path / "q", format_name, IntegerScheme(4, 32, symmetric=False))
    found = report(path, capsys)
    assert found["problems"] == []
    assert found["format"] == format_name
    rows = {row["role"]: row for row in found["modules"]}
    assert rows["model.layers.*.mlp.up_proj"]["scheme"] == "int4 asym g32"
    assert rows["lm_head"]["scheme"] == "float32"
    assert (
        18 <= rows["model.layers.*.mlp.up_proj"]["bytes_per_group"] <= 25
    )  # 16 of codes, 2 to 4 of scale, zero, index
    assert 4.6 < found["linear_bits_per_weight"] < 6.5
    assert {row["role"] for row in found["others"]} >= {"model.layers.*.self_attn.q_proj.bias", "model.norm.weight"}


def test_a_layer_that_differs_is_listed_apart(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = IntegerScheme(4, 32, symmetric=False)
    path = quantized(tiny_checkpoint("llama"), tmp_path / "q", "gptq", scheme, skip="layers.1.mlp.down_proj")
    rows = [row for row in report(path, capsys)["modules"] if row["role"].endswith("down_proj")]
    assert sorted((row["layers"], row["scheme"]) for row in rows) == [("0", "int4 asym g32"), ("1", "float32")]


def test_missing_and_unexpected_tensors_are_told_once_a_role(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {n: t for n, t in tensors.items() if "up_proj" not in n and "layers.1.input_layernorm" not in n}
        return kept | {"model.layers.0.extra.weight": torch.ones(3), "model.layers.1.extra.weight": torch.ones(3)}

    rewrite(model, change)
    assert report(model, capsys)["problems"] == [
        "model.layers.*.mlp.up_proj.weight (2 layers) is missing",
        "model.layers.1.input_layernorm.weight is missing",
        "model.layers.*.extra.weight (2 layers) belongs to no part of a llama model",
    ]


def test_shapes_that_contradict_the_config_are_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(model, intermediate_size=96)
    problems = report(model, capsys)["problems"]
    assert "model.layers.*.mlp.up_proj.weight (2 layers) has shape [128, 64], and the config wants [96, 64]" in problems


def test_quantized_shapes_that_contradict_the_config_are_told(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = quantized(tiny_checkpoint("llama"), tmp_path / "q", "awq", IntegerScheme(4, 32, symmetric=False))
    edit_config(path, intermediate_size=96)
    problems = report(path, capsys)["problems"]
    assert "model.layers.0.mlp.up_proj holds a weight [128, 64], and the config wants [96, 64]" in problems


def test_a_leftover_quantization_config_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(model, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})
    assert report(model, capsys)["problems"] == [
        "the config has a quantization_config (awq), but no weight is quantized"
    ]


def test_quantized_tensors_without_a_quantization_config_are_told(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = quantized(tiny_checkpoint("llama"), tmp_path / "q", "awq", IntegerScheme(4, 32, symmetric=False))
    edit_config(path, quantization_config=None)
    problems = report(path, capsys)["problems"]
    assert any("up_proj.qweight (2 layers) is stored, but the config has no quantization_config" in p for p in problems)


def test_values_that_are_no_numbers_are_found(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
        tensors["model.layers.1.self_attn.q_proj.weight"].zero_()
        return tensors

    rewrite(model, change)
    assert report(model, capsys)["problems"] == [
        "model.layers.0.mlp.up_proj: 1 of 8192 values of weight are NaN or infinite",
        "model.layers.1.self_attn.q_proj: all values of the weight are zero",
    ]


def test_kv_cache_scales_are_summed_up(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scales = {
        "model.layers.0.self_attn.k_scale": torch.tensor([0.25]),
        "model.layers.1.self_attn.k_scale": torch.tensor([0.5]),
        "model.layers.0.self_attn.v_proj.output_scale": torch.tensor(float("nan")),
    }
    rewrite(model, lambda tensors: tensors | scales)
    found = report(model, capsys)
    assert found["kv_scales"] == {"count": 3, "smallest": 0.25, "largest": 0.5}
    assert found["problems"] == ["model.layers.0.self_attn.v_proj.output_scale is not a positive number"]


def test_a_stored_head_that_is_tied_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(model, tie_word_embeddings=True)
    problems = report(model, capsys)["problems"]
    assert problems == ["lm_head.weight is stored although the config ties it to the embedding"]


def test_a_missing_tokenizer_or_template_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "chat_template.jinja").unlink()
    assert report(model, capsys)["problems"] == ["the tokenizer has no chat template"]
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    assert "there is no tokenizer" in report(model, capsys)["problems"][0]


def test_an_unknown_family_is_a_problem_and_no_failure(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(model, model_type="mamba", architectures=None)
    found = report(model, capsys)
    assert found["num_parameters"] is None
    assert any("model_type 'mamba' is not supported" in problem for problem in found["problems"])
    assert found["modules"][0]["shape"] == [384, 64]


def test_the_text_on_a_pipe_is_plain_and_whole(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(model), "--tensors"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.isascii()
    lines = out.splitlines()
    assert lines[0] == str(model)
    assert any(line.split() == ["model.layers.*.mlp.up_proj", "0-1", "float32", "128x64", "0.07"] for line in lines)
    assert any(line.startswith("model.layers.1.mlp.up_proj.weight") for line in lines)
    assert lines[-1] == "problems: none"


def test_the_table_on_a_terminal_shows_the_same(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    assert run(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.mlp.up_proj" in out
    assert "┃" in out


def test_json_goes_to_a_file_beside_the_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(model), "--json", str(tmp_path / "i.json"), "--tensors"]) == 0
    assert "problems: none" in capsys.readouterr().out
    found = json.loads((tmp_path / "i.json").read_text())
    assert {tensor["name"] for tensor in found["tensors"]} == set(open_checkpoint(model).tensors)


def test_a_json_file_in_no_directory_is_refused_first(model: Path, tmp_path: Path) -> None:
    assert run(["inspect", str(model), "--json", str(tmp_path / "no" / "i.json")]) == 2


def test_what_cannot_be_read_ends_with_3(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model.safetensors").write_bytes(b"x" * 7)
    assert run(["inspect", str(model)]) == 3
    assert run(["inspect", str(tmp_path / "modle")]) == 3
    err = capsys.readouterr().err
    assert "too short for a safetensors file" in err
    assert "hint: did you mean" in err


@pytest.mark.sample_model
def test_the_sample_model_has_no_problems(sample_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(sample_model, capsys)
    assert found["problems"] == []
    assert found["num_parameters"] == 134_515_008
    assert found["linear_bits_per_weight"] == 5
    assert found["modules"][0]["scheme"] == "int8 sym g32"


def test_roles_and_layer_ranges() -> None:
    assert role("model.layers.12.mlp.experts.3.up_proj") == "model.layers.*.mlp.experts.3.up_proj"
    assert layer_ranges(f"a.{i}.b" for i in (0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    assert layer_ranges(["lm_head"]) == ""


def test_a_norm_that_holds_no_numbers_is_told_without_reading_everything(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(model, lambda tensors: tensors | {"model.norm.weight": torch.full((64,), float("inf"))})
    assert "model.norm.weight holds NaN or infinite values" in report(model, capsys)["problems"]


def test_a_slip_in_a_command_s_name_suggests_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspekt", "x"]) == 2
    assert "Did you mean 'inspect'?" in capsys.readouterr().err
