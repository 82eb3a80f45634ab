"""Reports for CI systems: valid whatever names and messages hold."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from aphroquant.errors import UsageError
from aphroquant.evaluation.gate import GateCheck
from aphroquant.pipeline import github
from aphroquant.pipeline.gates import share_of
from aphroquant.pipeline.junit import junit
from aphroquant.pipeline.markdown import markdown
from aphroquant.pipeline.reports import json_report
from aphroquant.pipeline.result import OutputResult, PipelineResult, StepResult

NASTY = 'a | b <c> & "d" \x00\x1b[31m `e` 100%, f:\ng\r\ufffe'
# Children and attributes of the JUnit schema that Jenkins and GitLab read.
ATTRIBUTES = {
    "testsuites": {"name", "tests", "failures", "errors", "time"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time"},
    "testcase": {"name", "classname", "time"},
    "failure": {"message", "type"},
    "error": {"message", "type"},
    "skipped": {"message"},
    "system-out": set[str](),
}


@pytest.fixture
def result() -> PipelineResult:
    checks = [GateCheck("max_kld", 0.5, 0.1, False, NASTY), GateCheck("min_top1", float("inf"), 0.9, True)]
    output = OutputResult(
        "awq", Path("out"), "awq", {"engines": {"vLLM": ""}}, {"num_bytes": 5, "warnings": [NASTY]}, None, checks
    )
    steps = [
        StepResult("plan", "done", 1.5, NASTY),
        StepResult("verify", "failed", 2.0, NASTY, "awq"),
        StepResult("publish", "skipped", 0.0, NASTY),
        StepResult("convert", "cached", 99.0, NASTY, "awq"),
    ]
    return PipelineResult(NASTY, NASTY, {}, steps=steps, outputs={"awq": output}, notes=[NASTY], error=NASTY)


def test_junit_has_the_elements_attributes_and_counts_of_its_schema(result: PipelineResult) -> None:
    root = ElementTree.fromstring(junit(result).encode())
    for element in root.iter():
        assert set(element.attrib) == ATTRIBUTES[element.tag], element.tag
    for suite in root.findall("testsuite"):
        for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.attrib[count]) == len(suite.findall(f"testcase/{tag}"))
        assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("6", "1", "1")
    assert float(root.get("time") or 0) == 3.5


def test_markdown_tables_hold_any_text(result: PipelineResult) -> None:
    rows = [line for line in markdown(result).splitlines() if line.startswith("|")]
    unescaped = [line.replace("\\\\", "").replace("\\|", "") for line in rows]
    assert {line.count("|") for line in unescaped} == {10, 6, 5}
    assert "<c>" not in "".join(rows)


def test_annotations_are_one_line_each_with_everything_escaped(result: PipelineResult) -> None:
    lines = list(github.annotation_lines(result))
    assert [line.split(" ", 1)[0] for line in lines] == ["::error", "::error", "::warning", "::notice"]
    assert not any("\n" in line or "\r" in line for line in lines)
    assert "100%25" in lines[0]
    assert github.command("error", "a:b,c", "d:e") == "::error title=a%3Ab%2Cc::d:e"


def test_an_error_outside_of_the_steps_is_annotated_too() -> None:
    failed = PipelineResult("demo", "source", {}, error="no")
    assert list(github.annotation_lines(failed)) == ["::error title=demo failed::no"]


@pytest.mark.parametrize(
    ("check", "sentence"),
    [
        (GateCheck("max_kld", 0.25, 0.1, False), "mean KLD 0.25 is above max_kld 0.1"),
        (GateCheck("min_top1", 0.5, 0.9, False, "wiki"), "top-1 agreement 0.5 is below min_top1 0.9 on wiki"),
        (GateCheck("max_ppl_ratio", 1.0, 1.1, True), "perplexity ratio 1 keeps max_ppl_ratio 1.1"),
    ],
)
def test_a_check_is_told_in_a_sentence(check: GateCheck, sentence: str) -> None:
    assert check.sentence == sentence


def test_the_summary_is_added_to_the_steps_file(result: PipelineResult, tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    github.write_summary(result, {"GITHUB_STEP_SUMMARY": str(path)})
    assert path.read_text() == "before\n" + markdown(result)
    github.write_summary(result, {})
    with pytest.raises(UsageError, match="cannot be written"):
        github.write_summary(result, {"GITHUB_STEP_SUMMARY": str(tmp_path / "no" / "file")})


def test_the_json_report_is_strict_json(result: PipelineResult) -> None:
    found = json.loads(json_report(result), parse_constant=pytest.fail)
    assert found["outputs"]["awq"]["gate"][1]["value"] is None


def test_a_share_is_a_percentage_or_a_number() -> None:
    assert [share_of(text) for text in ("5%", "0.05", " 12.5 % ", "0")] == [0.05, 0.05, 0.125, 0.0]
    for text in ("five", "-1", "nan", "inf", "5 %%", ""):
        with pytest.raises(UsageError, match="is no share"):
            share_of(text)
