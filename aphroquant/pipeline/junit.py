"""The result as JUnit XML: a suite for the steps, and one for the gates of each output."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from aphroquant.evaluation.gate import GateCheck
from aphroquant.pipeline.result import OutputResult, PipelineResult, StepResult

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(result: PipelineResult) -> str:
    """The document."""
    root = ElementTree.Element("testsuites", {"name": _text(result.name)})
    suites = [_steps(result), *(_gates(output) for output in result.outputs.values() if output.checks)]
    for suite in suites:
        root.append(suite)
    for count in ("tests", "failures", "errors", "skipped"):
        if count != "skipped":  # which this element has not
            root.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    root.set("time", f"{result.seconds:.3f}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _steps(result: PipelineResult) -> ElementTree.Element:
    cases = [_step_case(step) for step in result.steps if step.name != "gate"]  # whose bounds are cases of their own
    return _suite("pipeline", cases, sum(step.seconds for step in result.steps if step.status != "cached"))


def _step_case(step: StepResult) -> ElementTree.Element:
    seconds = 0.0 if step.status == "cached" else step.seconds
    case = _case("aphroquant.pipeline", step.title, seconds)
    if step.status == "failed":
        ElementTree.SubElement(case, "error", {"message": _text(step.message), "type": "error"})
    elif step.status == "skipped":
        ElementTree.SubElement(case, "skipped", {"message": _text(step.message)})
    elif step.message:
        ElementTree.SubElement(case, "system-out").text = _text(step.message)
    return case


def _gates(output: OutputResult) -> ElementTree.Element:
    return _suite(output.name, [_gate_case(output, check) for check in output.checks], 0.0)


def _gate_case(output: OutputResult, check: GateCheck) -> ElementTree.Element:
    case = _case(f"aphroquant.gates.{output.name}", check.label, 0.0)
    told = check.sentence + ("" if check.note is None else f"; {check.note}")
    if check.passed:
        ElementTree.SubElement(case, "system-out").text = _text(told)
    else:
        ElementTree.SubElement(case, "failure", {"message": _text(told), "type": _text(check.name)}).text = _text(told)
    return case


def _case(group: str, name: str, seconds: float) -> ElementTree.Element:
    attributes = {"classname": _text(group), "name": _text(name), "time": f"{seconds:.3f}"}
    return ElementTree.Element("testcase", attributes)


def _suite(name: str, cases: Sequence[ElementTree.Element], seconds: float) -> ElementTree.Element:
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    suite = ElementTree.Element("testsuite", {"name": _text(name), **{key: str(n) for key, n in counts.items()}})
    suite.set("time", f"{seconds:.3f}")
    suite.extend(cases)
    return suite


def _text(text: str) -> str:
    """Without what XML cannot hold."""
    return _NOT_XML.sub("\ufffd", text)
