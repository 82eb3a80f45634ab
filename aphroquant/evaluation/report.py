"""An evaluation in words: rows of a table, the same for a terminal (rich) and for plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from aphroquant.evaluation.drift import Drift
from aphroquant.evaluation.gate import GateCheck
from aphroquant.evaluation.intervals import Interval
from aphroquant.evaluation.noise import NoiseFloor
from aphroquant.evaluation.pairs import Comparison, PairedDifference
from aphroquant.evaluation.result import Evaluation
from aphroquant.evaluation.tasks import TaskResults


class Row(NamedTuple):
    """A label and columns; in the main part they are the model's figure, the base's, and the noise floor."""

    label: str
    value: str
    second: str = ""
    third: str = ""


Section = tuple[Row, list[Row]]  # headings, rows


def rows(result: Evaluation) -> list[Row]:
    """The figures worth reading, in the order of weight."""
    floor = result.noise_floor
    return [
        Row("mean KL divergence", _with_error(result.mean_kld, result.mean_kld_stderr), "", _floor(floor, "mean_kld")),
        Row("median / p90 KLD", f"{result.median_kld:.5f} / {result.p90_kld:.5f}", "", _floor(floor, "median_kld")),
        Row("p99 KLD", f"{result.p99_kld:.5f}", "", _floor(floor, "p99_kld")),
        Row("p99.9 KLD", f"{result.p999_kld:.5f}", "", _floor(floor, "p999_kld")),
        Row("max KLD", f"{result.max_kld:.5f}", "", _floor(floor, "max_kld")),
        Row(
            "top-1 agreement", _share(result.top1_agreement, result.top1_interval), "",
            "" if floor is None else f"{floor.top1_agreement:.2%}",
        ),
        Row("perplexity", f"{result.perplexity:.4f}", f"{result.base_perplexity:.4f}"),
        Row(
            "ln(perplexity ratio)", _with_error(result.log_ratio, result.log_ratio_stderr), "",
            _floor(floor, "log_ratio"),
        ),
        Row("delta-p mean / RMS", f"{result.delta_p_mean:+.2%} / {result.delta_p_rms:.2%}"),
        Row("non-finite positions", f"{result.non_finite_share:.2%}"),
        Row("bits per weight, linears", *_pair(result, "linear_bits_per_weight", "{:.3f}")),
        Row("bits per weight, all", *_pair(result, "bits_per_weight", "{:.3f}")),
        Row("size, MB", f"{result.size.num_bytes / 1e6:.1f}", f"{result.base_size.num_bytes / 1e6:.1f}"),
    ]  # fmt: skip


def text_rows(result: Evaluation) -> list[Row]:
    """The figures of each text, where there are several."""
    if len(result.texts) < 2:
        return []
    return [
        Row(
            f"{part.text.name} ({part.windows} windows)",
            _with_error(part.mean_kld, part.mean_kld_stderr),
            f"{part.top1_agreement:.2%}",
            f"{part.perplexity_ratio:.4f}",
        )
        for part in result.texts
    ]


def bucket_rows(result: Evaluation) -> list[Row]:
    """Mean divergence and agreement by how sure the base was: where it was sure, damage hides from the mean."""
    return [
        Row(
            f"{bucket.low:g} < base p <= {bucket.high:g} ({bucket.share:.0%})",
            f"{bucket.mean_kld:.5f}",
            f"{bucket.top1_agreement:.2%}",
        )
        for bucket in result.buckets
        if bucket.share
    ]


def drift_rows(drift: Drift | None) -> list[Row]:
    """Where greedy answers part, by kind of prompt."""
    if drift is None:
        return []
    return [
        Row(
            f"{kind.kind} ({kind.prompts} x {kind.prompt_tokens:.0f} tokens)",
            " / ".join("-" if place is None else f"{place:.0f}" for place in kind.quartiles),
            f"{kind.never:.0%}",
        )
        for kind in drift.kinds
    ]  # fmt: skip


def task_rows(tasks: TaskResults | None) -> list[Row]:
    """Scores of tasks."""
    if tasks is None:
        return []
    return [
        Row(
            f"{score.task} {score.metric}",
            _score(score.value, score.stderr),
            _score(score.base_value, score.base_stderr),
        )
        for score in tasks.scores
    ]  # fmt: skip


def gate_rows(checks: Sequence[GateCheck]) -> list[Row]:
    """Every bound with the value and the verdict."""
    return [Row(check.label, f"{check.value:.5g}", "pass" if check.passed else "FAIL") for check in checks]


def comparison_rows(comparisons: Sequence[Comparison]) -> list[Row]:
    """Every pair of candidates, and whether they can be told apart."""
    return [
        Row(
            f"{comparison.first} - {comparison.second}",
            _difference(comparison.kld),
            _difference(comparison.loss),
            verdict(comparison),
        )
        for comparison in comparisons
    ]


def verdict(comparison: Comparison) -> str:
    """Which of two candidates is nearer to the base, if that can be said."""
    if comparison.better is None:
        return "not distinguishable"
    below = ", by less than the noise floor" if comparison.below_floor else ""
    return f"{comparison.better} is nearer{below}"


def protocol_line(result: Evaluation) -> str:
    """How it was measured, in one line."""
    protocol = result.protocol
    fewer = protocol.windows < protocol.requested_windows * len(protocol.texts)
    asked = f" ({protocol.requested_windows} asked for{' of each text' * (len(protocol.texts) > 1)})" if fewer else ""
    names = ", ".join(text.name for text in protocol.texts)
    drawn = "evenly spaced" if protocol.seed is None else f"seed {protocol.seed}"
    floor = result.noise_floor
    floored = "" if floor is None else f"; the noise floor is the base with {floor.setting}, {floor.windows} windows"
    return (
        f"{protocol.windows} windows{asked} of {protocol.window_len} tokens, {drawn}, no BOS, "
        f"{protocol.scored_tokens} scored tokens of {names}, {protocol.dtype}, {result.seconds:.0f} s; "
        f"+- is one standard error, clustered by window; intervals are of 95 %{floored}"
    )


def notes(result: Evaluation, checks: Sequence[GateCheck]) -> list[str]:
    """What makes figures or verdicts doubtful, one sentence each."""
    found = [
        f"{check.label}: {check.note}"
        for check in checks
        if check.note and check.text is None and not check.is_relative
    ]
    return found + [
        f"{result.model} was calibrated on {name}: there it looks better than it is" for name in result.calibrated_on
    ]


def sections(result: Evaluation, checks: Sequence[GateCheck]) -> list[Section]:
    """(headings, rows) of every part of the report that has any."""
    floor = "" if result.noise_floor is None else "noise floor"
    parts = [
        (Row("figure", "model", "base", floor), rows(result)),
        (Row("by text", "mean KLD", "top-1", "perplexity ratio"), text_rows(result)),
        (Row("by confidence", "mean KLD", "top-1"), bucket_rows(result)),
        (Row("generation drift", "first difference, quartiles", "identical"), drift_rows(result.drift)),
        (Row("task", "model", "base"), task_rows(result.tasks)),
        (Row("gate", "value", "verdict"), gate_rows(checks)),
    ]
    return [part for part in parts if part[1]]


def plain_text(result: Evaluation, checks: Sequence[GateCheck]) -> str:
    """The report as aligned text."""
    return "\n\n".join([_aligned(sections(result, checks)), *_paragraphs(result, checks)])


def comparison_text(comparisons: Sequence[Comparison]) -> str:
    """Pairs of candidates as aligned text."""
    return _aligned([(Row("pair", "KLD difference", "loss difference", "verdict"), comparison_rows(comparisons))])


def table(result: Evaluation, checks: Sequence[GateCheck]) -> Table:
    """The report as one rich table."""
    parts = sections(result, checks)
    title = f"{result.model} against {result.against}"
    return _table(parts, title, "\n".join(_paragraphs(result, checks)))


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Pairs of candidates as a rich table."""
    headings = Row("pair", "KLD difference", "loss difference", "verdict")
    return _table([(headings, comparison_rows(comparisons))], "candidates against each other", None)


def _paragraphs(result: Evaluation, checks: Sequence[GateCheck]) -> list[str]:
    return [*(f"note: {note}" for note in notes(result, checks)), protocol_line(result)]


def _aligned(parts: Sequence[Section]) -> str:
    widths = [max(len(row[i]) for heading, body in parts for row in (heading, *body)) for i in range(4)]

    def line(row: Row) -> str:
        columns = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join((f"{row.label:<{widths[0]}}", *columns)).rstrip()

    return "\n\n".join("\n".join(line(row) for row in (heading, *body)) for heading, body in parts)


def _table(parts: Sequence[Section], title: str, caption: str | None) -> Table:
    rich_table = Table(title=title, caption=caption)
    columns = 4 if any(row.third for heading, body in parts for row in (heading, *body)) else 3
    for number, heading_text in enumerate(parts[0][0][:columns]):
        rich_table.add_column(heading_text, justify="right" if number else "left")
    for heading, body in parts:
        if heading is not parts[0][0]:
            rich_table.add_section()
            rich_table.add_row(*heading[:columns], style="bold")
        for row in body:
            rich_table.add_row(*row[:columns], style="red" if row.second == "FAIL" else None)
    return rich_table


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5f}" if error is None else f"{value:.5f} +- {error:.5f}"


def _share(value: float, interval: Interval | None) -> str:
    return f"{value:.2%}" if interval is None else f"{value:.2%} ({interval[0]:.1%} .. {interval[1]:.1%})"


def _floor(floor: NoiseFloor | None, name: str) -> str:
    return "" if floor is None else f"{getattr(floor, name):.5f}"


def _difference(difference: PairedDifference) -> str:
    error = "" if difference.stderr is None else f" +- {difference.stderr:.5f}"
    return f"{difference.mean:+.5f}{error}"


def _score(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def _pair(result: Evaluation, name: str, form: str) -> tuple[str, str]:
    return form.format(getattr(result.size, name)), form.format(getattr(result.base_size, name))
