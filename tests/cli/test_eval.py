"""`aphroquant eval`: what it prints, what it writes, and what it exits with."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aphroquant.cli import run

TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"The model number {i} answers {i * i} questions." for i in range(60)))
    return path


@pytest.fixture
def base(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """The base with slightly disturbed weights."""
    path = tmp_path / "model"
    shutil.copytree(base, path)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = tensor + 0.05 * tensor.std() * torch.randn_like(tensor)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def evaluate(model: Path, base: Path, text_file: Path) -> Callable[..., int]:
    """`evaluate(*options)`: the exit code of a small evaluation."""

    def call(*options: str) -> int:
        windows = ("--windows", "2", "--window-len", "64")
        return run(["eval", str(model), "--against", str(base), "--text", str(text_file), *windows, *options])

    return call


def test_without_bounds_it_prints_figures_and_succeeds(
    evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate() == 0
    out, err = capsys.readouterr()
    for label in ("mean KL divergence", "p99.9 KLD", "top-1 agreement", "perplexity", "bits per weight", "size, MB"):
        assert label in out
    assert "2 windows of 64 tokens, evenly spaced, no BOS, 126 scored tokens" in out
    assert "nan" not in out
    assert "base model: done" in err
    assert "KL" not in err


def test_plain_columns_are_aligned(evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("p99 KLD", "max KLD"))]
    assert len(lines) == 2
    assert len({len(line) for line in lines}) == 1


def test_json_holds_every_figure_the_protocol_and_the_gate(evaluate: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert evaluate("--json", str(path), "--max-kld", "100", "--min-top1", "0.01") == 0
    record = json.loads(path.read_text())
    assert 0 < record["mean_kld"] < record["p99_kld"] <= record["p999_kld"] <= record["max_kld"]
    assert record["perplexity_ratio"] == pytest.approx(record["perplexity"] / record["base_perplexity"])
    assert record["protocol"]["window_len"] == 64
    assert record["protocol"]["texts"][0]["sha256"]
    assert record["size"]["num_bytes"] == record["base_size"]["num_bytes"]
    assert record["versions"]["torch"] == torch.__version__
    assert [check["name"] for check in record["gate"]] == ["max_non_finite", "max_kld", "min_top1"]
    assert record["passed"] is True


@pytest.mark.parametrize(
    ("option", "bound"),
    [("max-kld", "1e-9"), ("max-p99-kld", "1e-9"), ("max-p999-kld", "1e-9"), ("min-top1", "1"), ("max-ppl-ratio", "0")],
)
def test_a_missed_bound_exits_with_4_after_everything_was_written(
    option: str, bound: str, evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert evaluate(f"--{option}", bound, "--json", str(path)) == 4
    out, err = capsys.readouterr()
    name = option.replace("-", "_")
    verdict = next(line for line in out.splitlines() if line.startswith(name))
    assert verdict.endswith("FAIL")
    assert re.search(f"error: the quality gate failed: .* is (above|below) {name}", err)
    record = json.loads(path.read_text())
    assert record["passed"] is False
    assert [check["name"] for check in record["gate"] if not check["passed"]] == [name]


def test_every_bound_is_listed_also_those_that_hold(
    evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--max-kld", "1e-9", "--max-ppl-ratio", "100") == 4
    verdicts = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line}
    assert verdicts["max_kld"] == "FAIL"
    assert verdicts["max_ppl_ratio"] == verdicts["max_non_finite"] == "pass"


def test_a_model_that_computes_nan_fails_without_any_bound(
    model: Path, evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "figures.json"
    assert evaluate("--json", str(path)) == 4
    assert "max_non_finite" in capsys.readouterr().err
    assert json.loads(path.read_text())["non_finite_share"] == 1.0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--max-kld", "nan"], 2, "max_kld = nan must be a number of at least 0"),
        (["--max-kld", "-1"], 2, "max_kld = -1.0 must be a number of at least 0"),
        (["--min-top1", "90"], 2, "hint: for 90 % give 0.9"),
        (["--seed", "-1"], 2, "seed = -1 must be between 0 and 2**63 - 1"),
        (["--seed", str(2**64)], 2, "must be between 0 and 2**63 - 1"),
        (["--windows", "0"], 2, "windows = 0 must be at least 1"),
        (["--window-len", "4096"], 2, "window_len = 4096 must be at most 512"),
        (["--window-len", "long"], 2, "Invalid value for '--window-len'"),
        (["--text", "/nowhere/text"], 3, "/nowhere/text: cannot be read"),
        (["--json", "/nowhere/figures.json"], 2, "there is no directory /nowhere"),
        (["--json", "/tmp"], 2, "is a directory; give a file name"),
    ],
)
def test_mistakes_are_told_with_their_exit_code(
    options: list[str], code: int, message: str, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*options) == code
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


@pytest.mark.parametrize("option", ["--fewshot", "--task-limit", "--task-path"])
def test_settings_of_tasks_without_tasks_are_a_mistake(
    option: str, model: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", str(model), "--against", str(base), option, "5"]) == 2
    assert f"{option} 5 is for tasks, and none is asked for" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_input_error(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "/nowhere/model", "--against", str(base)]) == 3
    assert "/nowhere/model" in capsys.readouterr().err


def test_the_base_must_be_given(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(model)]) == 2
    assert "Missing option '--against'" in capsys.readouterr().err


def test_on_a_terminal_a_table_is_drawn(
    evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    assert evaluate("--max-kld", "1e-9") == 4
    out, err = capsys.readouterr()
    assert "┃" in out
    assert "FAIL" in out
    assert "quantized model" in err


def test_several_models_are_compared_and_each_has_its_gate(
    model: Path, base: Path, evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert evaluate(str(base), "--max-kld", "1e-5", "--json", str(path)) == 4
    out, err = capsys.readouterr()
    assert f"error: the quality gate failed: {model}: mean KLD " in err
    assert " is above max_kld 1e-05" in err
    assert f"{base} is nearer" in out
    record = json.loads(path.read_text())
    assert [found["model"] for found in record["evaluations"]] == [str(model), str(base)]
    assert [found["passed"] for found in record["evaluations"]] == [False, True]
    assert record["comparisons"][0]["better"] == str(base)
    assert record["passed"] is False


def test_each_text_has_its_own_gates(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, path = tmp_path / "other.txt", tmp_path / "figures.json"
    other.write_text("Another text of a lazy dog and a quick fox. " * 20)
    assert evaluate("--text", str(other), "--max-kld", "100", "--json", str(path)) == 0
    out = capsys.readouterr().out
    assert f"max_kld 100 on {other}" in out
    record = json.loads(path.read_text())
    assert [check["text"] for check in record["gate"] if check["name"] == "max_kld"] == [
        None, *(text["name"] for text in record["protocol"]["texts"]),
    ]  # fmt: skip
    assert len(record["texts"]) == 2


def test_the_noise_floor_is_beside_the_figures_and_can_be_left_out(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert evaluate("--json", str(path), "--max-kld", "1e-12") == 4
    out = capsys.readouterr().out
    assert "noise floor" in out
    assert "note: max_kld 1e-12: the base itself has" in out
    assert json.loads(path.read_text())["noise_floor"]["mean_kld"] > 0
    assert evaluate("--json", str(path), "--no-noise-floor") == 0
    assert "noise floor" not in capsys.readouterr().out
    assert json.loads(path.read_text())["noise_floor"] is None


def test_the_report_is_written_before_the_gate_fails(evaluate: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert evaluate("--html", str(path), "--max-kld", "1e-12") == 4
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "1 of 2 checks failed" in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(("target", "message"), [("-", "needs the name of a file"), ("/tmp", "is a directory")])
def test_a_report_that_could_not_be_written_is_told_before_the_work(
    target: str, message: str, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--html", target) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "base model" not in err
    assert out == ""


def test_drift_is_measured_where_it_is_asked_for(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "figures.json", tmp_path / "report.html"
    assert evaluate("--drift", "--drift-tokens", "8", "--json", str(path), "--html", str(page)) == 0
    out, err = capsys.readouterr()
    assert "reasoning (6 x" in out
    assert "answers: done" in err
    kinds = {kind["kind"]: kind for kind in json.loads(path.read_text())["drift"]["kinds"]}
    assert set(kinds) == {"short text", "long text", "reasoning"}
    assert list(kinds["reasoning"]["identical_after"]) == ["8"]
    assert "Generation drift" in page.read_text(encoding="utf-8")
    assert evaluate("--drift", "--drift-tokens", "512") == 2
    assert "drift tokens = 512 must be less than 512" in capsys.readouterr().err
