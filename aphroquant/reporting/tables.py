"""Tables of the report: the figures behind every plot, readable on their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aphroquant.evaluation.gate import GateCheck
from aphroquant.evaluation.intervals import Interval
from aphroquant.evaluation.pairs import PairedDifference
from aphroquant.evaluation.report import verdict
from aphroquant.evaluation.result import Evaluation
from aphroquant.reporting.heatmap import module_names
from aphroquant.reporting.markup import Child, Markup, element
from aphroquant.reporting.report import Candidate, Report, Step
from aphroquant.reporting.words import NOT_FINITE, duration, figure, megabytes, percent


def table(headings: Sequence[Child], rows: Sequence[Sequence[Child]], caption: str) -> Markup:
    """A table that scrolls by itself where the page is too narrow; its first column names the rows."""
    head = element("tr", (element("th", heading, scope="col") for heading in headings))
    body = (
        element("tr", element("th", row[0], scope="row"), (element("td", cell) for cell in row[1:])) for row in rows
    )
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", body))
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def candidates_table(report: Report) -> Markup:
    """Everything that counts, one candidate a row."""
    rows = [
        (
            element("span", one.name, element("small", one.made_by) if one.made_by else None, class_="model"),
            _outcome(one.passed),
            megabytes(one.evaluation.num_bytes),
            _bits(one.evaluation),
            _mean(one.evaluation.mean_kld, one.evaluation.mean_kld_interval),
            figure(one.evaluation.p99_kld),
            figure(one.evaluation.p999_kld),
            _share(one.evaluation.top1_agreement, one.evaluation.top1_interval),
            _ratio(one.evaluation.perplexity_ratio, one.evaluation.log_ratio_interval),
            percent(one.evaluation.delta_p_rms),
        )
        for one in report.candidates
    ]
    headings = (
        "candidate", "gate", "size", "bits / weight", "mean KLD", "p99 KLD", "p99.9 KLD", "top-1 agreement",
        "perplexity ratio", "Δp RMS",
    )  # fmt: skip
    return table(headings, rows, "Candidates; intervals are of 95 %, clustered by window")


def gates_table(candidates: Sequence[Candidate]) -> Markup:
    """Every check of every candidate."""
    several = len(candidates) > 1
    rows = [
        (
            f"{one.name}: {_check_name(check)}" if several else _check_name(check),
            _outcome(check.passed),
            _amount(check, check.value),
            [f"{'≥' if check.name.startswith('min') else '≤'} {_amount(check, check.bound)}", _small(_basis(check))],
        )
        for one in candidates
        for check in one.checks
    ]
    return table(("check", "verdict", "value", "bound"), rows, "Quality gates")


def comparisons_table(report: Report) -> Markup:
    """Every pair of candidates on the same positions."""
    rows = [
        (
            f"{one.first} − {one.second}",
            _paired(one.kld),
            _paired(one.loss),
            _paired(one.top1, as_share=True),
            verdict(one),
        )
        for one in report.comparisons
    ]
    headings = ("pair", "KLD", "token loss", "top-1 agreement", "verdict")
    return table(headings, rows, "Differences, position by position, with 95 % intervals")


def texts_table(candidates: Sequence[Candidate]) -> Markup:
    """Figures by text."""
    rows = [
        (
            f"{one.name}: {part.text.name}" if len(candidates) > 1 else part.text.name,
            part.windows,
            _mean(part.mean_kld, part.mean_kld_interval),
            figure(part.p99_kld),
            _share(part.top1_agreement, part.top1_interval),
            _ratio(part.perplexity_ratio, part.log_ratio_interval),
        )
        for one in candidates
        for part in one.evaluation.texts
    ]
    headings = ("text", "windows", "mean KLD", "p99 KLD", "top-1 agreement", "perplexity ratio")
    return table(headings, rows, "Figures of each text")


def histogram_table(candidates: Sequence[Candidate]) -> Markup:
    """Quantiles of the divergence."""
    names = ("median_kld", "p90_kld", "p99_kld", "p999_kld", "max_kld")
    rows = [
        (one.name, *(figure(getattr(one.evaluation, name)) for name in names), percent(one.evaluation.non_finite_share))
        for one in candidates
    ]
    headings = ("candidate", "median", "90 %", "99 %", "99.9 %", "largest", "not finite")
    return table(headings, rows, "Quantiles of the KL divergence, nats")


def confidence_table(candidates: Sequence[Candidate]) -> Markup:
    """Buckets of the base's largest probability."""
    return _bucket_table(candidates, "buckets", "base's largest probability")


def entropy_table(candidates: Sequence[Candidate]) -> Markup:
    """Buckets of the base's entropy."""
    return _bucket_table(candidates, "entropy_buckets", "base's entropy, nats")


def _bucket_table(candidates: Sequence[Candidate], attribute: str, what: str) -> Markup:
    first = getattr(candidates[0].evaluation, attribute)
    names = [f"{b.low:g} – {b.high:g}" if math.isfinite(b.high) else f"above {b.low:g}" for b in first]
    rows = []
    for i, name in enumerate(names):
        of_all = [getattr(one.evaluation, attribute)[i] for one in candidates]
        figures = (f"{figure(b.mean_kld)} ({percent(b.top1_agreement, 1)})" for b in of_all)
        rows.append((name, percent(of_all[0].share, 1), *figures))
    headings = (what, "positions", *(one.name for one in candidates))
    return table(headings, rows, "Mean KL divergence (and top-1 agreement) of each bucket")


def errors_table(candidate: Candidate) -> Markup:
    """The numbers of a heat map."""
    names = module_names(candidate.errors)
    errors = {(one.layer, one.module): one.error for one in candidate.errors}
    layers = sorted({one.layer for one in candidate.errors})
    rows = [(str(layer), *(figure(errors.get((layer, name)), 2) for name in names)) for layer in layers]
    return table(("layer", *names), rows, f"Relative squared output errors, {candidate.name}")


def drift_table(candidates: Sequence[Candidate]) -> Markup:
    """Where greedy answers part."""
    rows: list[tuple[Child, ...]] = []
    lengths: list[str] = []
    for one in candidates:
        for kind in one.evaluation.drift.kinds if one.evaluation.drift else ():
            lengths = list(kind.identical_after)
            rows.append(
                (
                    f"{one.name}: {kind.kind}" if len(candidates) > 1 else kind.kind,
                    f"{kind.prompts} × {kind.prompt_tokens:.0f} tokens",
                    *("never" if place is None else f"{place:.0f}" for place in kind.quartiles),
                    *(percent(share, 0) for share in kind.identical_after.values()),
                )
            )
    identical = (f"same after {length}" for length in lengths)
    headings = ("prompts", "number", "first quartile", "median", "third quartile", *identical)
    return table(headings, rows, "First token that differs from the base's greedy answer")


def tasks_table(candidates: Sequence[Candidate]) -> Markup:
    """Scores of tasks."""
    rows = [
        (
            f"{one.name}: {score.task}" if len(candidates) > 1 else score.task,
            score.metric,
            _scored(score.value, score.stderr),
            _scored(score.base_value, score.base_stderr),
            percent(score.recovery, 1),
        )
        for one in candidates
        for score in (one.evaluation.tasks.scores if one.evaluation.tasks else ())
    ]
    return table(("task", "metric", "candidate", "base", "recovery"), rows, "Tasks of lm-evaluation-harness")


def steps_table(steps: Sequence[tuple[str, Step]]) -> Markup:
    """(whose, step) in turn."""
    rows = [
        (
            f"{whose}: {step.name}" if whose else step.name,
            duration(step.seconds),
            "–" if step.peak_memory_bytes is None else megabytes(step.peak_memory_bytes),
        )
        for whose, step in steps
    ]
    return table(("step", "time", "peak memory"), rows, "Time and memory of each step")


def _amount(check: GateCheck, value: float) -> str:
    """Rounded as little as a bound that somebody wrote."""
    return megabytes(int(value)) if check.counts_bytes else f"{value:.4g}" if math.isfinite(value) else NOT_FINITE


def _basis(check: GateCheck) -> str | None:
    """What the bound was made from, if that is an earlier release."""
    return check.note if check.is_relative else None


def _check_name(check: GateCheck) -> str:
    return check.name if check.text is None else f"{check.name} on {check.text}"


def _bits(evaluation: Evaluation) -> list[Child]:
    """Of the decoder's linear layers, which are what is quantized; the rest of a small model may be most of it."""
    return [
        f"{evaluation.size.linear_bits_per_weight:.2f} in layers",
        _small(f"{evaluation.bits_per_weight:.2f} in all"),
    ]


def _outcome(passed: bool) -> Markup:
    return element("span", "✓ pass" if passed else "✗ fail", class_="pass" if passed else "fail")


def _mean(value: float, interval: Interval | None) -> list[Child]:
    return [figure(value), _small(None if interval is None else f"{figure(interval[0])} … {figure(interval[1])}")]


def _share(value: float, interval: Interval | None) -> list[Child]:
    return [percent(value), _small(None if interval is None else f"{interval[0]:.1%} … {interval[1]:.1%}")]


def _ratio(value: float, interval: Interval | None) -> list[Child]:
    if interval is None:
        return [figure(value, 4)]
    low, high = (figure(math.exp(min(end, 700.0)), 4) for end in interval)
    return [figure(value, 4), _small(f"{low} … {high}")]


def _paired(difference: PairedDifference, *, as_share: bool = False) -> list[Child]:
    ends = difference.interval
    small = None if ends is None else " … ".join(_signed(end, as_share) for end in ends)
    return [_signed(difference.mean, as_share), _small(small)]


def _signed(value: float, as_share: bool) -> str:
    return f"{value:+.2%}" if as_share else ("+" if value > 0 else "") + figure(value)


def _scored(value: float, error: float | None) -> list[Child]:
    return [f"{value:.4f}", _small(None if error is None else f"± {error:.4f}")]


def _small(text: str | None) -> Markup | None:
    return None if text is None else element("small", text)
