"""The pipeline on tiny models: every step, what is done again and what is not, gates, and two runs at once."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import GateError, InputError, UsageError
from aphroquant.pipeline.job import Job
from aphroquant.pipeline.result import PipelineResult
from aphroquant.pipeline.run import require_gates, run_pipeline
from aphroquant.recipes.loading import read_recipe

Tiny = Callable[..., Path]
Recipe = Callable[..., Path]
QUICK: dict[str, Any] = {
    "calibration": {"samples": 2, "seq_len": 32, "sources": [{"path": "default"}]},
    "outputs": {
        "awq": {"to": "awq", "group_size": 32},
        "gptq": {"to": "gptq", "group_size": 32},
        "gguf": {"to": "gguf", "scheme": "q8_0"},
    },
    "evaluation": {"windows": 2, "window_len": 32},
    "gates": {"max_kld": 50},
}


@pytest.fixture
def recipe(tiny_checkpoint: Tiny, tmp_path: Path) -> Recipe:
    """`recipe(**changes)`: a recipe's file, with keys in place of the quick ones'."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"source": str(tiny_checkpoint("llama")), **QUICK, **changes}))
        return path

    return write


def run(path: Path, **options: Any) -> PipelineResult:
    return run_pipeline(read_recipe(path), path.parent / "job", **options)


def statuses(result: PipelineResult) -> dict[str, str]:
    return {step.title: step.status for step in result.steps}


def test_a_pipeline_converts_verifies_measures_gates_publishes_and_reports(recipe: Recipe, tmp_path: Path) -> None:
    result = run(recipe(publish=[{"to": "released"}], report={"junit": "ci/junit.xml"}))
    assert result.passed
    outputs = tmp_path / "job" / "outputs"
    assert open_checkpoint(outputs / "awq").format_name == "awq"
    assert (outputs / "gguf.gguf").is_file()
    report = json.loads((tmp_path / "job" / "report" / "report.json").read_text())
    assert report["passed"] is True
    assert set(report["outputs"]) == {"awq", "gptq", "gguf"}
    for output in report["outputs"].values():
        assert output["evaluation"]["mean_kld"] >= 0
        assert output["planned"]["num_bytes"] == output["conversion"]["num_bytes"]
        assert "aphroquant" in output["planned"]["engines"]
        assert [check["name"] for check in output["gate"]] == ["max_non_finite", "max_kld"]
    assert len(report["comparisons"]) == 3
    page = (tmp_path / "job" / "report" / "report.html").read_text()
    assert all(f">{name}<" in page for name in ("awq", "gptq", "gguf"))
    kept = {path.relative_to(tmp_path / "released").as_posix() for path in (tmp_path / "released").rglob("*.*")}
    assert {"awq/model.safetensors", "gptq/config.json", "gguf/gguf.gguf"} <= kept
    assert (tmp_path / "ci" / "junit.xml").read_text() == (tmp_path / "job" / "report" / "junit.xml").read_text()
    record = json.loads((outputs / "awq" / "aphroquant.json").read_text())
    assert record["metrics"]["mean_kld"] == report["outputs"]["awq"]["evaluation"]["mean_kld"]


def test_what_has_not_changed_is_not_done_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = [{"to": "released"}]
    run(recipe(publish=published))
    again = run(recipe(publish=published))
    assert {
        status for title, status in statuses(again).items() if title.split()[0] not in ("plan", "gate", "report")
    } == {"cached"}
    assert again.passed
    assert len(again.comparisons) == 3
    monkeypatch.chdir(tmp_path.parent)  # paths are relative to elsewhere, and name the same places
    job = Path(tmp_path.name, "job")
    elsewhere = run_pipeline(read_recipe(Path(tmp_path.name, "recipe.yaml")), job, publishes=False)
    assert {step.status for step in elsewhere.steps if step.name in ("convert", "verify", "evaluate")} == {"cached"}
    assert {each[key] for each in elsewhere.comparisons for key in ("first", "second")} == {"awq", "gptq", "gguf"}
    changed = {**QUICK["outputs"], "gptq": {"to": "gptq", "group_size": 32, "bits": 8}}
    third = run(recipe(outputs=changed, publish=published))
    found = statuses(third)
    assert (found["convert awq"], found["convert gguf"], found["convert"]) == ("cached", "cached", "done")
    assert (found["verify awq"], found["verify gptq"]) == ("cached", "done")
    assert (found["evaluate awq"], found["evaluate"], found["publish"]) == ("cached", "done", "done")
    assert open_checkpoint(tmp_path / "released" / "gptq").format_name == "gptq"


def test_changed_texts_tighter_gates_and_damaged_outputs_are_noticed(recipe: Recipe, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    one = {"awq": QUICK["outputs"]["awq"]}
    calibration = {**QUICK["calibration"], "sources": [{"path": "text.txt"}]}
    path = recipe(outputs=one, calibration=calibration)
    run(path)
    text.write_text("A model is quantized, measured, and then it answers. " * 100)
    assert statuses(run(path))["convert"] == "done"
    path = recipe(outputs=one, calibration=calibration, gates={"max_kld": 0})
    found = statuses(run(path))
    assert (found["convert awq"], found["evaluate awq"], found["gate awq"]) == ("cached", "cached", "failed")
    weights = tmp_path / "job" / "outputs" / "awq" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert statuses(run(path))["convert"] == "done"


def test_a_missed_gate_is_reported_and_nothing_is_published(recipe: Recipe, tmp_path: Path) -> None:
    gates = {"max_kld": 50, "texts": {"default": {"max_kld": 0.0}}}
    outputs = {**QUICK["outputs"], "gguf": {"to": "gguf", "scheme": "q8_0", "gates": {"max_kld": 50}}}
    result = run(recipe(gates=gates, outputs=outputs, publish=[{"to": "released"}]))
    assert not result.passed
    assert {(name, check.text) for name, check in result.failed_checks} == {("awq", "default"), ("gptq", "default")}
    assert statuses(result)["publish"] == "skipped"
    assert not (tmp_path / "released").exists()
    with pytest.raises(GateError, match=r"the quality gate failed: awq: mean KLD \S+ is above max_kld 0 on default"):
        require_gates(result)
    suites = ElementTree.parse(tmp_path / "job" / "report" / "junit.xml").getroot()
    assert suites.get("failures") == "2"
    assert len(suites.findall(".//failure")) == 2
    assert {case.get("name") for case in suites.findall(".//testcase")} >= {"plan", "convert", "verify awq"}
    assert "**FAILED**" in (tmp_path / "job" / "report" / "report.md").read_text()


def test_an_earlier_release_gates_a_later_one(recipe: Recipe, tmp_path: Path) -> None:
    one = {"awq": QUICK["outputs"]["awq"]}
    run(recipe(outputs=one))
    baseline = tmp_path / "baseline.json"
    baseline.write_bytes((tmp_path / "job" / "report" / "report.json").read_bytes())
    assert run(recipe(outputs=one), baseline=baseline, max_regression=0.0).passed
    worse = {"awq": {"to": "awq", "group_size": 64, "solver": "rtn"}, "gguf": QUICK["outputs"]["gguf"]}
    result = run(recipe(outputs=worse), baseline=baseline, max_regression=0.05)
    assert "kld_vs_baseline" in {check.name for _, check in result.failed_checks}
    assert result.notes == ["gguf is new: the baseline has no output of that name"]
    other = {"windows": 1, "window_len": 32}
    with pytest.raises(UsageError, match="measured with other windows"):
        run(recipe(outputs=one, evaluation=other), baseline=baseline)
    for content in ("[]", "{}", '{"outputs": {}}', "nonsense"):
        baseline.write_text(content)
        with pytest.raises(InputError):
            run(recipe(outputs=one), baseline=baseline)


def test_a_step_that_fails_is_in_the_report_and_a_later_run_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aphroquant.pipeline import measuring

    evaluate = measuring.evaluate_models

    def broken(*arguments: Any, **options: Any) -> Any:
        raise InputError("no <such> & text\x00")

    path = recipe()
    monkeypatch.setattr(measuring, "evaluate_models", broken)
    with pytest.raises(InputError, match="no <such>"):
        run(path)
    folder = tmp_path / "job" / "report"
    assert json.loads((folder / "report.json").read_text())["passed"] is False
    assert ElementTree.parse(folder / "junit.xml").getroot().get("errors") == "1"
    monkeypatch.setattr(measuring, "evaluate_models", evaluate)
    found = statuses(run(path))
    assert (found["convert awq"], found["verify awq"], found["evaluate"]) == ("cached", "cached", "done")


def test_two_runs_on_one_job_exclude_each_other(recipe: Recipe, tmp_path: Path) -> None:
    with Job(tmp_path / "job"), pytest.raises(UsageError, match="is in use by another run"):
        run(recipe())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="is no job of an earlier run"):
        run_pipeline(read_recipe(recipe()), tmp_path / "mine")


def test_what_others_have_made_is_not_replaced(recipe: Recipe, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = recipe(outputs={"awq": {"to": "awq", "group_size": 32, "out": "out"}}, evaluation=None, gates={})
    run(path)
    assert open_checkpoint(out).format_name == "awq"
    changed = recipe(outputs={"awq": {"to": "gptq", "group_size": 32, "out": "out"}}, evaluation=None, gates={})
    assert run(changed).passed  # its own
    with pytest.raises(UsageError, match="exists and is not empty"):
        run_pipeline(read_recipe(path), tmp_path / "other job")


def test_a_damaged_state_means_that_steps_are_done_again(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(outputs={"fp8": {"to": "fp8"}}, evaluation=None, gates={})
    run(path)
    state = tmp_path / "job" / "state.json"
    whole = state.read_text()
    steps = json.loads(whole)["steps"]
    changed = {name: {**record, "found": {}} for name, record in steps.items()}
    for content in (
        whole[:300],
        "[]",
        '{"version": 9}',
        '{"version": 2, "steps": [1]}',
        json.dumps({**json.loads(whole), "steps": changed}),
    ):
        state.write_text(content)
        assert statuses(run(path))["convert"] == "done"
    assert statuses(run(path))["convert fp8"] == "cached"
    manifest = tmp_path / "job" / "outputs" / "fp8" / "aphroquant.json"
    for damage in (lambda: manifest.write_text("{"), lambda: manifest.write_text('{"files": 3}'), manifest.unlink):
        damage()
        assert statuses(run(path))["convert"] == "done"
        assert json.loads(manifest.read_text())["files"]


def test_a_run_killed_between_an_output_and_its_record_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(outputs={"fp8": {"to": "fp8", "out": "out"}}, evaluation=None, gates={})

    class Killed(BaseException):
        pass

    def killed(job: Job, paths: object) -> dict[str, str]:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Job, "records_of", killed)
        run(path)
    assert open_checkpoint(tmp_path / "out").format_name
    assert statuses(run(path))["convert"] == "done"


def test_missing_texts_and_impossible_targets_are_found_before_any_work(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "text.txt").write_text("Words. " * 999)
    for changes, message in (
        ({"evaluation": {"texts": {"wiki": "none.txt"}}}, r"evaluation.texts.wiki: there is no file"),
        (
            {"evaluation": {"texts": {"same": "text.txt"}}, "calibration": {"sources": [{"path": "text.txt"}]}},
            r"evaluation.texts.same: outputs are calibrated on .*text.txt",
        ),
        ({"publish": [{"to": "full"}]}, "has files in it that aphroquant has not published"),
        ({"publish": [{"to": "."}]}, "holds the source model|has files in it"),
        ({"publish": [{"to": "hf://no"}]}, "is no repository of the Hub"),
        ({"publish": [{"to": "nothing://x"}]}, "publish to nothing://x"),
    ):
        with pytest.raises((InputError, UsageError), match=message):
            run(recipe(**changes))
        assert not (tmp_path / "job" / "outputs").exists()
