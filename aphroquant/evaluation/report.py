"""An evaluation in words: rows of a table, the same for a terminal (rich) and for plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from aphroquant.evaluation.gate import GateCheck
from aphroquant.evaluation.result import Evaluation


class Row(NamedTuple):
    """A label and two columns; in the main part the second is the base's figure, where it has one."""

    label: str
    value: str
    second: str = ""


def rows(result: Evaluation) -> list[Row]:
    """The figures worth reading, in the order of weight."""
    return [
        Row("mean KL divergence", _with_error(result.mean_kld, result.mean_kld_stderr)),
        Row("median / p90 KLD", f"{result.median_kld:.5f} / {result.p90_kld:.5f}"),
        Row("p99 KLD", f"{result.p99_kld:.5f}"),
        Row("p99.9 KLD", f"{result.p999_kld:.5f}"),
        Row("max KLD", f"{result.max_kld:.5f}"),
        Row("top-1 agreement", f"{result.top1_agreement:.2%}"),
        Row("perplexity", f"{result.perplexity:.4f}", f"{result.base_perplexity:.4f}"),
        Row("ln(perplexity ratio)", _with_error(result.log_ratio, result.log_ratio_stderr)),
        Row("delta-p RMS", f"{result.delta_p_rms:.2%}"),
        Row("non-finite positions", f"{result.non_finite_share:.2%}"),
        Row("bits per weight, linears", *_pair(result, "linear_bits_per_weight", "{:.3f}")),
        Row("bits per weight, all", *_pair(result, "bits_per_weight", "{:.3f}")),
        Row("size, MB", f"{result.size.num_bytes / 1e6:.1f}", f"{result.base_size.num_bytes / 1e6:.1f}"),
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


def gate_rows(checks: Sequence[GateCheck]) -> list[Row]:
    """Every bound with the value and the verdict."""
    return [
        Row(f"{check.name} {check.bound:g}", f"{check.value:.5g}", "pass" if check.passed else "FAIL")
        for check in checks
    ]


def protocol_line(result: Evaluation) -> str:
    """How it was measured, in one line."""
    protocol = result.protocol
    fewer = f" ({protocol.requested_windows} asked for)" if protocol.windows < protocol.requested_windows else ""
    names = ", ".join(text.name for text in protocol.texts)
    drawn = "evenly spaced" if protocol.seed is None else f"seed {protocol.seed}"
    return (
        f"{protocol.windows} windows{fewer} of {protocol.window_len} tokens, {drawn}, no BOS, "
        f"{protocol.scored_tokens} scored tokens of {names}, {protocol.dtype}, {result.seconds:.0f} s; "
        "+- is one standard error, clustered by window"
    )


def sections(result: Evaluation, checks: Sequence[GateCheck]) -> list[tuple[Row, list[Row]]]:
    """(headings, rows) of every part of the report."""
    return [
        (Row("figure", "model", "base"), rows(result)),
        (Row("by confidence", "mean KLD", "top-1"), bucket_rows(result)),
        (Row("gate", "value", "verdict"), gate_rows(checks)),
    ]


def plain_text(result: Evaluation, checks: Sequence[GateCheck]) -> str:
    """The report as aligned text."""
    parts = sections(result, checks)
    widths = [max(len(row[i]) for heading, body in parts for row in (heading, *body)) for i in range(3)]

    def line(row: Row) -> str:
        return f"{row.label:<{widths[0]}}  {row.value:>{widths[1]}}  {row.second:>{widths[2]}}".rstrip()

    blocks = ["\n".join(line(row) for row in (heading, *body)) for heading, body in parts]
    return "\n\n".join([*blocks, protocol_line(result)])


def table(result: Evaluation, checks: Sequence[GateCheck]) -> Table:
    """The report as one rich table."""
    parts = sections(result, checks)
    rich_table = Table(title=f"{result.model} against {result.against}", caption=protocol_line(result))
    for title in parts[0][0]:
        rich_table.add_column(title, justify="left" if title == "figure" else "right")
    for heading, body in parts:
        if heading is not parts[0][0]:
            rich_table.add_section()
            rich_table.add_row(*heading, style="bold")
        for row in body:
            rich_table.add_row(*row, style="red" if row.second == "FAIL" else None)
    return rich_table


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5f}" if error is None else f"{value:.5f} +- {error:.5f}"


def _pair(result: Evaluation, name: str, form: str) -> tuple[str, str]:
    return form.format(getattr(result.size, name)), form.format(getattr(result.base_size, name))
