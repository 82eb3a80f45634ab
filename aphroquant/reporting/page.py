"""The page: one HTML file that holds everything, with no script and nothing to fetch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from aphroquant.errors import UsageError
from aphroquant.evaluation.report import notes, protocol_line
from aphroquant.reporting import tables
from aphroquant.reporting.distributions import by_confidence, by_entropy, histogram
from aphroquant.reporting.heatmap import heat_map
from aphroquant.reporting.markup import Child, Markup, element
from aphroquant.reporting.plot import legend
from aphroquant.reporting.report import Candidate, Report, Step
from aphroquant.reporting.scatter import quality_against_size
from aphroquant.reporting.steps import time_bars
from aphroquant.reporting.words import figure, megabytes, percent
from aphroquant.reporting.worst_tokens import worst_tokens

_STYLE = Path(__file__).parent / "report.css"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched and no script runs, whatever is in here


def write_report(path: str | Path, report: Report) -> None:
    """Write the page. It has its name only when it is whole."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.write_text(render(report), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"the report {path} cannot be written: {error.strerror or error}") from error


def render(report: Report) -> str:
    """The page as text."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", report.title),
        element("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    )
    sections = [section for make in _SECTIONS if (section := make(report)) is not None]
    body = element("body", _header(report), element("main", sections), _footer(report))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _header(report: Report) -> Markup:
    first = report.candidates[0].evaluation
    checks = [check for one in report.candidates for check in one.checks]
    failed = sum(not check.passed for check in checks)
    gate = f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"
    verdict = element("p", gate, class_="verdict fail" if failed else "verdict pass") if checks else None
    return element(
        "header",
        element("h1", report.title),
        verdict,
        element(
            "p",
            f"Measured against {first.against} ({megabytes(first.base_size.num_bytes)}) on "
            f"{first.protocol.scored_tokens:,} tokens.",
            class_="lead",
        ),
        _cards(report.candidates[0]) if len(report.candidates) == 1 else None,
    )


def _cards(candidate: Candidate) -> Markup:
    """The figures that one candidate is judged by."""
    result = candidate.evaluation
    floor = "" if result.noise_floor is None else f"noise floor {figure(result.noise_floor.mean_kld)}"
    cards = (
        ("mean KL divergence", figure(result.mean_kld), floor),
        ("p99.9 KL divergence", figure(result.p999_kld), f"largest {figure(result.max_kld)}"),
        ("top-1 agreement", percent(result.top1_agreement), ""),
        ("perplexity", figure(result.perplexity, 4), f"base {figure(result.base_perplexity, 4)}"),
        (
            "size",
            megabytes(result.num_bytes),
            f"bits / weight: {result.size.linear_bits_per_weight:.2f} of layers, {result.bits_per_weight:.2f} in all",
        ),
    )
    entries = (
        element("div", element("dt", name), element("dd", value, element("small", more) if more else None))
        for name, value, more in cards
    )
    return element("dl", entries, class_="cards")


def _candidates(report: Report) -> Markup:
    doubts: dict[str, list[str]] = {}
    for one in report.candidates:
        for note in notes(one.evaluation, one.checks):
            doubts.setdefault(note, []).append(one.name)
    everyone = len(report.candidates)
    told = [note if len(names) == everyone else f"{', '.join(names)}: {note}" for note, names in doubts.items()]
    warned = element("ul", (element("li", note) for note in told), class_="notes") if told else None
    return _section("Candidates", tables.candidates_table(report), warned)


def _gates(report: Report) -> Markup | None:
    return (
        _section("Gates", tables.gates_table(report.candidates))
        if any(one.checks for one in report.candidates)
        else None
    )


def _plots(report: Report) -> Markup:
    candidates = report.candidates
    names = [one.name for one in candidates]
    plots = [
        _figure(
            "Quality against size",
            "Left and down is better. The line joins candidates that no other beats in both; bars are 95 % intervals.",
            quality_against_size(candidates),
            legend(names),
            tables.candidates_table(report),
        )
    ]
    drawings = (
        (
            "How divergence is distributed",
            "Share of positions by KL divergence. A long right side is damage that the mean hides.",
            histogram(candidates),
            tables.histogram_table,
        ),
        (
            "By the base's confidence",
            "Mean divergence where the base was unsure (left) and sure (right).",
            by_confidence(candidates),
            tables.confidence_table,
        ),
        (
            "By the base's entropy",
            "Mean divergence where few tokens were possible (left) and where many were (right).",
            by_entropy(candidates),
            tables.entropy_table,
        ),
    )
    plots += [
        _figure(title, text, drawing, legend(names), numbers(candidates))
        for title, text, drawing, numbers in drawings
        if drawing is not None
    ]
    return _section("Quality", element("div", plots, class_="columns"))


def _comparisons(report: Report) -> Markup | None:
    return _section("Candidates against each other", tables.comparisons_table(report)) if report.comparisons else None


def _texts(report: Report) -> Markup | None:
    several = any(len(one.evaluation.texts) > 1 for one in report.candidates)
    return _section("By text", tables.texts_table(report.candidates)) if several else None


def _drift(report: Report) -> Markup | None:
    return _measured(report, "Generation drift", tables.drift_table, lambda one: one.evaluation.drift is not None)


def _tasks(report: Report) -> Markup | None:
    return _measured(report, "Tasks", tables.tasks_table, lambda one: one.evaluation.tasks is not None)


def _measured(
    report: Report, title: str, make: Callable[[Sequence[Candidate]], Markup], has: Callable[[Candidate], bool]
) -> Markup | None:
    found = [one for one in report.candidates if has(one)]
    return _section(title, make(found)) if found else None


def _layers(report: Report) -> Markup | None:
    maps = [(one, drawing) for one in report.candidates if (drawing := heat_map(one)) is not None]
    if not maps:
        return None
    text = (
        "Squared and relative, as the conversion measured it. Each map has a scale of its own, from the twentieth that "
        "is best to the twentieth that is worst; right is worse."
    )
    figures = (_figure(one.name, text, drawing, None, tables.errors_table(one)) for one, drawing in maps)
    return _section("Error by layer and module", element("div", figures, class_="columns"))


def _worst(report: Report) -> Markup | None:
    found = [(one, listed) for one in report.candidates if (listed := worst_tokens(one)) is not None]
    if not found:
        return None
    explained = element(
        "p",
        "The positions of greatest divergence. The marked token is what followed in the text; beside it are the most "
        "likely tokens of both models.",
        class_="lead",
    )
    lists = (
        element("details", element("summary", one.name), listed, class_="tokens", open=i == 0)
        for i, (one, listed) in enumerate(found)
    )
    return _section("Worst tokens in context", explained, *lists)


def _steps(report: Report) -> Markup | None:
    several = len(report.candidates) > 1
    steps = [("", step) for step in report.steps]
    steps += [(one.name if several else "", step) for one in report.candidates for step in one.steps]
    if not steps:
        return None
    named = [
        Step(f"{whose}: {step.name}" if whose else step.name, step.seconds, step.peak_memory_bytes)
        for whose, step in steps
    ]
    drawing = _figure("Time per step", "The steps that were done in this run.", time_bars(named), None, None)
    return _section("Time and memory", element("div", drawing, tables.steps_table(steps), class_="columns"))


def _protocol(report: Report) -> Markup:
    first = report.candidates[0].evaluation
    protocol = first.protocol
    facts = {
        "method": protocol_line(first),
        "texts": ", ".join(
            f"{text.name} ({text.num_characters:,} characters, SHA-256 {text.sha256[:16]}…)" for text in protocol.texts
        ),
        "context length": f"{protocol.window_len} tokens, the first of a window is not scored",
        "windows": f"{protocol.windows}, "
        + ("evenly spaced" if protocol.seed is None else f"drawn with seed {protocol.seed}"),
        "beginning of sequence": "a BOS token" if protocol.bos else "no BOS token",
        "vocabulary": f"{protocol.vocab_size:,} tokens compared",
        "arithmetic": protocol.dtype,
    }
    evaluated = report.environment or first.versions
    made = {key: value for one in report.candidates for key, value in one.environment.items()}
    parts = (
        {"Converted and evaluated with": made}
        if made == evaluated
        else {"Evaluated with": evaluated, "Converted with": made}
    )
    told = ((element("h3", title), _facts(part)) for title, part in parts.items() if part)
    return _section("Protocol and environment", _facts(facts), *(child for pair in told for child in pair))


_SECTIONS: tuple[Callable[[Report], Markup | None], ...] = (
    _candidates, _gates, _plots, _comparisons, _texts, _drift, _tasks, _layers, _worst, _steps, _protocol,
)  # fmt: skip


def _section(title: str, *children: Child) -> Markup:
    return element("section", element("h2", title), *children)


def _figure(title: str, text: str, drawing: Markup, key: Markup | None, numbers: Markup | None) -> Markup:
    """A plot, its explanation, and the numbers behind it."""
    caption = element("figcaption", element("h3", title), element("p", text) if text else None)
    behind = None if numbers is None else element("details", element("summary", "The numbers"), numbers)
    return element("figure", caption, drawing, key, behind)


def _facts(facts: dict[str, str]) -> Markup:
    pairs = (element("div", element("dt", name), element("dd", value)) for name, value in facts.items() if value)
    return element("dl", pairs, class_="facts")


def _footer(report: Report) -> Markup:
    version = report.candidates[0].evaluation.versions.get("aphroquant", "")
    return element(
        "footer", element("p", f"Written by aphroquant {version}. This file holds everything; it fetches nothing.")
    )
