"""The gates of a recipe: bounds on all texts and on each, and no worse than an earlier release."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aphroquant.checkpoint.base import read_json
from aphroquant.errors import InputError, UsageError
from aphroquant.evaluation.gate import Bounds, GateCheck, check_bounds, check_text_bounds
from aphroquant.evaluation.result import Evaluation
from aphroquant.recipes.models import AllGates, Gates

_PERCENT = re.compile(r"(\d+(?:\.\d*)?)\s*%")
_SLACK = 1e-6  # nats, or share: of values so small, a part of them is less than what float32 tells apart

# What may not grow by more than the allowed share, and how it is read.
_REGRESSIONS: Mapping[str, Callable[[Evaluation], float]] = {
    "kld_vs_baseline": lambda result: result.mean_kld,
    "p99_kld_vs_baseline": lambda result: result.p99_kld,
    "top1_changes_vs_baseline": lambda result: 1 - result.top1_agreement,
    "bytes_vs_baseline": lambda result: float(result.num_bytes),
}


def checks_of(result: Evaluation, gates: AllGates | None, texts: Mapping[str, str]) -> list[GateCheck]:
    """Every bound of an output. `texts` are the recipe's names of texts, by those in the result."""
    gates = gates or AllGates()
    checks = check_bounds(result, _bounds(gates))
    measured = {name: text for text, name in texts.items()}
    for name, own in gates.texts.items():
        checks += check_text_bounds(result, measured[name], _bounds(own))
    return [check._replace(text=texts.get(check.text, check.text) if check.text else None) for check in checks]


def regressions(result: Evaluation, baseline: Evaluation, allowed: float) -> list[GateCheck]:
    """No figure worse than the baseline's by more than the share `allowed`. UsageError if it was measured otherwise."""
    _check_comparable(result, baseline)
    checks = []
    for name, figure in _REGRESSIONS.items():
        before, now = figure(baseline), figure(result)
        bound = before * (1 + allowed) + (0.0 if name == "bytes_vs_baseline" else _SLACK)
        if math.isfinite(bound):
            told = f"{before:,.0f} bytes" if name == "bytes_vs_baseline" else f"{before:.6g}"
            checks.append(GateCheck(name, now, bound, now <= bound, None, f"the baseline has {told}"))
    return checks


def read_baseline(path: Path) -> dict[str | None, Evaluation]:
    """The evaluations of an earlier report.json by output; of `eval --json` of one model, under None."""
    data: Any = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: is no report of aphroquant")
    outputs = data.get("outputs")
    if not isinstance(outputs, dict):
        return {None: _evaluation(path, data)}
    measured = {name: output["evaluation"] for name, output in outputs.items() if _is_measured(output)}
    if not measured:
        raise InputError(f"{path}: has no evaluation of any output")
    return {name: _evaluation(path, evaluation) for name, evaluation in measured.items()}


def share_of(text: str) -> float:
    """5% or 0.05 as 0.05. UsageError for anything else."""
    match = _PERCENT.fullmatch(text.strip())
    try:
        share = float(match[1]) / 100 if match else float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf:
        raise UsageError(f"--max-regression {text!r} is no share", hint="as 5% or 0.05")
    return share


def _bounds(gates: Gates) -> Bounds:
    return Bounds(**{name: getattr(gates, name) for name in Bounds.__dataclass_fields__ if hasattr(gates, name)})


def _check_comparable(result: Evaluation, baseline: Evaluation) -> None:
    ours, theirs = result.protocol, baseline.protocol
    for what, now, before in (
        ("texts", [text.sha256 for text in ours.texts], [text.sha256 for text in theirs.texts]),
        ("windows", ours.windows, theirs.windows),
        ("window_len", ours.window_len, theirs.window_len),
        ("seed", ours.seed, theirs.seed),
    ):
        if now != before:
            raise UsageError(
                f"the baseline was measured with other {what}, so that nothing follows from comparing",
                hint="measure as it was, or make a new baseline",
            )


def _is_measured(output: Any) -> bool:
    return isinstance(output, dict) and isinstance(output.get("evaluation"), dict)


def _evaluation(path: Path, data: dict[str, Any]) -> Evaluation:
    try:
        return Evaluation.from_dict(data)
    except InputError as error:
        raise InputError(
            f"{path}: {error.message}", hint="give report.json, or what eval --json has written"
        ) from error
