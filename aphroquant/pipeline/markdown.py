"""The result as Markdown, for a step summary or a release's notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from aphroquant.checkpoint.disk import size_text
from aphroquant.evaluation.gate import GateCheck
from aphroquant.pipeline.result import OutputResult, PipelineResult, StepResult

_SIGNS = {"done": "done", "cached": "unchanged", "failed": "**FAILED**", "skipped": "skipped"}


def markdown(result: PipelineResult) -> str:
    """Verdict, outputs, gates, steps."""
    verdict = "passed" if result.passed else "FAILED"
    lines = [f"# {_cell(result.name)}: {verdict}", "", f"Source: `{_code(result.source)}`"]
    if result.error is not None:
        lines += ["", f"**Error:** {_cell(result.error)}"]
    if result.outputs:
        lines += ["", "## Outputs", "", *_table(_OUTPUTS, map(_output, result.outputs.values()))]
    checks = [(name, check) for name, output in result.outputs.items() for check in output.checks]
    if checks:
        lines += ["", "## Gates", "", *_table(_GATES, (_gate(name, check) for name, check in checks))]
    lines += ["", "## Steps", "", *_table(_STEPS, map(_step, result.steps))]
    if result.published:
        lines += ["", "Published to " + ", ".join(f"`{_code(place)}`" for place in result.published)]
    lines += [line for note in result.notes for line in ("", _cell(note))]
    return "\n".join(lines) + "\n"


_OUTPUTS = ("output", "format", "size", "bits a weight", "mean KLD", "top-1", "perplexity", "loads in", "verdict")
_GATES = ("output", "bound", "text", "is", "verdict")
_STEPS = ("step", "result", "seconds", "")


def _output(output: OutputResult) -> Sequence[str]:
    conversion, evaluation = output.conversion or output.planned, output.evaluation or {}
    return (
        output.name,
        f"{output.to}, {conversion.get('scheme', '')}",
        size_text(conversion.get("num_bytes", 0)),
        f"{conversion.get('bits_per_weight', 0):.2f}",
        _figure(evaluation, "mean_kld", "{:.4f}"),
        _figure(evaluation, "top1_agreement", "{:.2%}"),
        _figure(evaluation, "perplexity", "{:.3f}"),
        ", ".join(output.planned["engines"]),
        ("passed" if output.passed else "**FAILED**") if output.checks else "not measured",
    )


def _gate(name: str, check: GateCheck) -> Sequence[str]:
    verdict = "passed" if check.passed else "**FAILED**"
    return name, f"{check.name} {check.bound:.6g}", check.text or "all", f"{check.value:.6g}", verdict


def _step(step: StepResult) -> Sequence[str]:
    return step.title, _SIGNS[step.status], f"{step.seconds:.1f}", step.message


def _figure(evaluation: dict[str, Any], name: str, form: str) -> str:
    value = evaluation.get(name)
    return "–" if value is None else form.format(value)


def _table(head: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(text if text == '**FAILED**' else _cell(text) for text in row)} |"


def _cell(text: str) -> str:
    """Text that Markdown shows as it is."""
    plain = " ".join(text.split())
    return "".join(f"\\{char}" if char in "\\|`*_<>[]" else char for char in plain)


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
