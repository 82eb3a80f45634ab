"""aphroquant recipe: init, validate, show, list."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from aphroquant.cli import run
from aphroquant.recipes.loading import load_recipe, read_recipe


def test_init_writes_a_recipe_that_validates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    assert run(["recipe", "init", "release-set", "--source", "org/model", "--out", str(path)]) == 0
    assert read_recipe(path).recipe.source == "org/model"
    assert run(["recipe", "validate", str(path)]) == 0
    assert "4 outputs: awq, gptq, fp8, gguf" in capsys.readouterr().out
    assert run(["recipe", "init", "--out", str(path)]) == 2
    assert "exists" in capsys.readouterr().err


def test_validate_finds_wrong_keys_impossible_outputs_and_missing_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    for text, code, words in (
        ("outputs: {a: {to: awq}}\ncalibartion: {}\n", 3, "line 2: unknown key 'calibartion'"),
        ("outputs: {a: {to: awk}}\n", 2, "outputs.a: unknown format 'awk'"),
        ("outputs: {a: {to: awq}}\ncalibration: {sources: [{path: no.txt}]}\n", 3, "there is no file"),
    ):
        path.write_text(text)
        assert run(["recipe", "validate", str(path)]) == code
        assert words in capsys.readouterr().err


def test_show_prints_a_recipe_its_defaults_and_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "show", "gguf-ladder", "--resolved"]) == 0
    resolved = load_recipe(capsys.readouterr().out)
    assert resolved.outputs == read_recipe("gguf-ladder").recipe.outputs
    assert run(["recipe", "show", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False
    assert run(["recipe", "show"]) == 2
    assert run(["recipe", "list"]) == 0
    assert "release-set" in capsys.readouterr().out


def test_a_name_too_long_for_a_file_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pipeline", "run", "x" * 300]) == 2
    assert "is too long for the name of a file" in capsys.readouterr().err


def test_a_step_that_fails_is_in_the_summary_and_annotated(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {tiny_checkpoint('llama')}\noutputs: {{awq: {{to: awq, group_size: 48}}}}\n")
    assert run(["pipeline", "run", str(recipe), "--job", str(tmp_path / "job")]) == 2
    assert "| plan | **FAILED** |" in (tmp_path / "summary.md").read_text()
    assert capsys.readouterr().out.startswith("::error title=plan failed::")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "none.md"))
    assert run(["pipeline", "run", str(recipe), "--job", str(recipe)]) == 2
    assert "::error title=aphroquant pipeline::--job" in capsys.readouterr().out
    assert not (tmp_path / "none.md").exists()


def test_a_summary_that_cannot_be_written_hides_no_result(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "file"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"source: {tiny_checkpoint('llama')}\noutputs: {{hqq: {{to: hqq, bits: 2, group_size: 32}}}}\n"
        "calibration: {samples: 0}\nevaluation: {windows: 1, window_len: 32}\ngates: {max_kld: 0}\n"
    )
    assert run(["pipeline", "run", str(recipe), "--job", str(tmp_path / "job")]) == 4
    told = capsys.readouterr().err
    assert "warning: GITHUB_STEP_SUMMARY=" in told
    assert "the quality gate failed: hqq" in told
