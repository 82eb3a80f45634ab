"""Two checkpoints as functions: repacked ones are the same, and what differs is named with how much."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.checkpoint import open_checkpoint
from aphroquant.cli import run
from aphroquant.conversion import convert
from aphroquant.inspection import Comparison, compare
from aphroquant.inspection.report import comparison_lines, verdict
from aphroquant.inspection.weights import Difference, paired
from aphroquant.schemes import FloatScheme, IntegerScheme

Make = Callable[..., Path]
SYMMETRIC = IntegerScheme(4, 32, symmetric=True)
UP = "model.layers.1.mlp.up_proj"


def compared(first: Path, second: Path) -> Comparison:
    return compare(open_checkpoint(first), open_checkpoint(second))


@pytest.fixture
def model(tiny_checkpoint: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_a_copy_is_the_same_bytes(model: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(model, copy).verdict == "same bytes"
    assert run(["inspect", str(model), str(copy)]) == 0
    assert "same bytes: every file of the model is the same" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
def test_a_repacked_checkpoint_is_the_same_function(
    quantized: Make, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = quantized("gptq", SYMMETRIC)
    convert(source, to=to, out=tmp_path / "out")
    found = compared(source, tmp_path / "out")
    assert found.verdict == "same function"
    assert all(entry.same_bits for entry in (*found.modules, *found.tensors))
    assert run(["inspect", str(source), str(tmp_path / "out")]) == 0
    assert "same function: all 16 modules dequantize to the same bits" in capsys.readouterr().out


def test_a_dense_model_and_its_gguf_file_are_the_same_function(model: Path, tmp_path: Path) -> None:
    from aphroquant.checkpoint import GgufTensorPlan, GgufWriter

    checkpoint = open_checkpoint(model)
    path = tmp_path / "model.gguf"
    with GgufWriter(path, checkpoint.config, None) as writer:
        writer.plan({name: GgufTensorPlan(info.shape, "F32") for name, info in checkpoint.tensors.items()})
        for name in checkpoint.tensors:
            writer.add(name, checkpoint.read(name))
        writer.finish()
    found = compared(model, path)
    assert found.different_modules == found.different_tensors == []
    assert [change.name for change in found.changes if change.kind == "config"] == []


def test_errors_are_those_of_float64(model: Path, quantized: Make) -> None:
    found = compared(model, quantized("gptq", SYMMETRIC))
    assert found.verdict == "different"
    assert len(found.different_modules) == 14
    quantized_weight = open_checkpoint(Path(found.theirs)).weight(UP).dequantize(torch.float64)
    dense = open_checkpoint(model).weight(UP)["weight"].double()
    entry = next(entry for entry in found.modules if entry.name == UP)
    expected = float((quantized_weight - dense).norm() / dense.norm())
    assert entry.relative_error == pytest.approx(expected, rel=1e-6)
    assert entry.sqnr_db == pytest.approx(-20 * math.log10(expected), rel=1e-6)
    assert entry.largest_error == pytest.approx(float((quantized_weight - dense).abs().max()), rel=1e-6)
    assert found.worst is not None
    assert found.worst.relative_error == max(entry.relative_error or 0 for entry in found.modules)


def test_one_changed_number_is_found_and_ends_with_4(
    model: Path, copy: Path, damage: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy, lambda tensors: tensors[f"{UP}.weight"][3, 5].add_(1.0))
    assert run(["inspect", str(model), str(copy)]) == 4
    out, err = capsys.readouterr()
    assert f"different: in 1 of 16 modules, worst {UP}" in out
    assert "are different: in 1 of 16 modules" in err


def test_a_number_that_is_none_is_worse_than_any(model: Path, copy: Path, damage: Make) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight"][0, 0] = torch.nan
        tensors["model.layers.0.mlp.up_proj.weight"].add_(100.0)

    worst = compared(model, damage(copy, change)).worst
    assert worst is not None
    assert (worst.name, worst.relative_error, worst.not_finite) == (UP, None, 1)


def test_tensors_of_one_side_and_other_shapes_are_listed(model: Path, copy: Path, damage: Make) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["extra.weight"] = torch.ones(3)
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].T.contiguous()

    found = compared(model, damage(copy, change))
    assert (found.only_ours, found.only_theirs) == (("model.norm.weight",), ("extra.weight",))
    assert found.shapes == ((UP, "[128, 64] against [64, 128]"),)
    assert found.verdict == "different"


def test_a_tied_head_is_the_same_as_a_stored_copy(model: Path, copy: Path, damage: Make, edit: Make) -> None:
    def tie(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(damage(model, tie), tie_word_embeddings=True)
    assert compared(model, damage(copy, untie)).verdict == "same function"


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope"),
        ({"rms_norm_eps": 1e-5}, "norm_eps"),
    ],
)
def test_a_config_that_changes_the_function_is_told(
    model: Path, copy: Path, edit: Make, keys: dict[str, object], name: str
) -> None:
    found = compared(model, edit(copy, **keys))
    assert [change.name for change in found.changes if change.changes_function] == [name]
    assert found.verdict == "different"


def test_a_longer_context_changes_no_function(model: Path, copy: Path, edit: Make) -> None:
    found = compared(model, edit(copy, max_position_embeddings=1024))
    assert [(change.name, change.changes_function) for change in found.changes] == [("max_position_embeddings", False)]
    assert found.verdict == "same function"


def test_quantized_inputs_are_another_function(quantized: Make) -> None:
    from aphroquant.schemes import ActivationScheme

    first = quantized("compressed-tensors", FloatScheme("channel"), name="first")
    second = quantized(
        "compressed-tensors", FloatScheme("channel", activations=ActivationScheme("float")), name="second"
    )
    found = compared(first, second)
    assert found.different_modules == []
    assert {change.kind for change in found.changes} == {"inputs"}
    assert found.verdict == "different"


def test_templates_and_carried_files_are_compared(model: Path, copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    changes = compared(model, copy).changes
    assert ("tokenizer", "chat template") in [(change.kind, change.name) for change in changes]
    assert ("file", "chat_template.jinja") in [(change.kind, change.name) for change in changes]


def test_cache_scales_under_two_spellings_are_the_same(model: Path, copy: Path, damage: Make) -> None:
    attention = "model.layers.0.self_attn"
    damage(model, lambda tensors: tensors | {f"{attention}.k_scale": torch.tensor([0.5])})
    damage(copy, lambda tensors: tensors | {f"{attention}.k_proj.output_scale": torch.tensor([0.5])})
    assert compared(model, copy).verdict == "same function"


def test_different_norms_bring_a_word_about_rescaling(
    model: Path, copy: Path, damage: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    def fold(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.post_attention_layernorm.weight"].mul_(2)
        for name in ("gate", "up"):
            tensors[f"model.layers.0.mlp.{name}_proj.weight"].div_(2)

    assert run(["inspect", str(model), str(damage(copy, fold)), "--logits"]) == 4
    out = capsys.readouterr().out
    assert "--logits measures the function" in out
    assert "KL divergence, mean, nats: " in out
    assert float(out.partition("KL divergence, largest, nats: ")[2].split()[0]) < 1e-6


def test_the_comparison_is_json(model: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "chat_template.jinja").unlink()
    run(["inspect", str(model), str(copy), "--json", "-"])
    report = json.loads(capsys.readouterr().out)
    assert report["num_modules"] == len(report["modules"]) == 16
    assert report["verdict"] == "different"


@pytest.mark.parametrize("arguments", [["A", "B", "--verify"], ["A", "B", "--tensors"], ["A", "--logits"]])
def test_options_that_do_not_go_together_are_refused(arguments: list[str]) -> None:
    assert run(["inspect", *arguments]) == 2


def test_pieces_are_paired_however_they_are_cut() -> None:
    values = torch.arange(10.0)
    pairs = list(paired(values.split([3, 7]), values.split([5, 0, 4, 1])))  # type: ignore[no-untyped-call]
    assert all(torch.equal(*pair) for pair in pairs)
    assert sum(len(pair[0]) for pair in pairs) == 10


def test_zeros_of_two_signs_are_the_same_values_but_not_bits() -> None:
    found = Difference("x", (2,), "", "")
    found.add(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert (found.same_values, found.same_bits, found.relative_error) == (True, False, 0.0)


def test_what_differs_is_counted_in_tensors(model: Path, tiny_checkpoint: Make, damage: Make) -> None:
    found = compared(model, tiny_checkpoint("llama", hidden_size=128))
    told = comparison_lines(found)
    assert any("in the shape of 21 tensors" in line for line in told)
    assert not any("modules that both have" in line for line in told), "there are none"
    extra = damage(model, lambda tensors: tensors.update({"vision.weight": torch.ones(3)}))
    assert "in 1 tensor that only one of them has" in verdict(compared(tiny_checkpoint("llama"), extra))
