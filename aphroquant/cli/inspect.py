"""aphroquant inspect: what a checkpoint is made of, what is wrong with it, and what differs between two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aphroquant.cli.byte_progress import stage_progress
from aphroquant.cli.json_report import STANDARD_OUTPUT, check_json_target, write_json
from aphroquant.errors import GateError, UsageError, one_line

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint
    from aphroquant.checkpoint.inspection import Inspection

Rows = list[tuple[str, ...]]
_MODULES = ("module", "layers", "scheme", "shape", "bytes/group", "MB")
_OTHERS = ("not quantized", "layers", "dtype", "shape", "MB")
_TENSORS = ("tensor", "dtype", "shape", "bytes", "file")
_LOGIT_WINDOWS = (4, 256)


@click.command()
@click.argument("source", metavar="DIR_OR_FILE")
@click.argument("other", metavar="[OTHER]", required=False)
@click.option("--verify", "verifies", is_flag=True, help="Check every number in it; exit code 4 if there are errors.")
@click.option("--logits", is_flag=True, help="With OTHER: compare what both predict for some text, too.")
@click.option("--json", "json_file", metavar="FILE", help="Write the report here as JSON; - for standard output.")
@click.option("--tensors", is_flag=True, help="List every stored tensor too.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit, of a Hugging Face id.")
def command(
    source: str,
    other: str | None,
    verifies: bool,
    logits: bool,
    json_file: str | None,
    tensors: bool,
    revision: str | None,
) -> None:
    """Show a checkpoint's format, model, schemes, sizes and problems; or say what differs between two.

    DIR_OR_FILE is a directory, a .gguf or .safetensors file, or a Hugging Face id. Problems are told and change no exit
    code; only a checkpoint that cannot be read does (3). With --verify every tensor is read, and errors end with 4.

    With OTHER, both are compared as the functions that they are, whatever their formats: 0 if they are the same, 4 if
    they differ.
    """
    check_json_target(json_file)
    if other is not None:
        if verifies or tensors or revision:
            raise UsageError("--verify, --tensors and --revision look at one checkpoint, and two are given")
        _compare(source, other, logits, json_file)
        return
    if logits:
        raise UsageError("--logits compares two checkpoints, and one is given")
    from aphroquant.checkpoint import open_checkpoint
    from aphroquant.checkpoint.inspection import inspect_checkpoint

    checkpoint = open_checkpoint(source, revision=revision)
    if verifies:
        _verify(checkpoint, tensors, json_file)
        return
    report = inspect_checkpoint(checkpoint)
    if json_file != STANDARD_OUTPUT:
        _show(report, _tensor_rows(checkpoint) if tensors else [])
    if json_file is not None:
        write_json(json_file, report.to_dict() | ({"tensors": _tensor_dicts(checkpoint)} if tensors else {}))


def _verify(checkpoint: Checkpoint, tensors: bool, json_file: str | None) -> None:
    from aphroquant.inspection import verify
    from aphroquant.inspection.report import FINDING_HEADINGS, counts, finding_rows, verification_line

    with stage_progress("checking", "MB", 1e6) as on_progress:
        found = verify(checkpoint, on_progress)
    if json_file != STANDARD_OUTPUT:
        console = Console(highlight=False, soft_wrap=True)
        console.print(found.path, markup=False)
        for headings, rows in (
            (_TENSORS, _tensor_rows(checkpoint) if tensors else []),
            (FINDING_HEADINGS, finding_rows(found)),
        ):
            if rows:
                print_table(console, headings, rows)
        console.print()
        console.print(verification_line(found), markup=False)
    if json_file is not None:
        write_json(json_file, found.to_dict() | ({"tensors": _tensor_dicts(checkpoint)} if tensors else {}))
    if not found.passed:
        raise GateError(f"{found.path}: verification found {counts(found)}")


def _compare(source: str, other: str, logits: bool, json_file: str | None) -> None:
    from aphroquant.checkpoint import open_checkpoint
    from aphroquant.inspection import compare
    from aphroquant.inspection.report import (
        CHANGE_HEADINGS,
        DIFFERENCE_HEADINGS,
        change_rows,
        comparison_lines,
        difference_rows,
        verdict,
    )

    checkpoints = open_checkpoint(source), open_checkpoint(other)
    with stage_progress("comparing", "tensors", 1) as on_progress:
        found = compare(*checkpoints, on_progress)
    measured = _logits(source, other) if logits else {}
    if json_file != STANDARD_OUTPUT:
        console = Console(highlight=False, soft_wrap=True)
        for headings, rows in ((DIFFERENCE_HEADINGS, difference_rows(found)), (CHANGE_HEADINGS, change_rows(found))):
            if rows:
                print_table(console, headings, rows)
        console.print()
        for line in (*comparison_lines(found), *(f"{name}: {value:.4g}" for name, value in measured.items())):
            console.print(line, markup=False)
    if json_file is not None:
        write_json(json_file, found.to_dict() | ({"logits": measured} if logits else {}))
    if found.verdict == "different":
        raise GateError(f"{source} and {other} are {verdict(found)}")


def _logits(source: str, other: str) -> dict[str, float]:
    """How far B's predictions are from A's on a few windows of the bundled text."""
    from aphroquant.evaluation import evaluate

    windows, window_len = _LOGIT_WINDOWS
    with stage_progress("computing logits", "steps", 1) as on_progress:
        result = evaluate(
            other,
            against=source,
            windows=windows,
            window_len=window_len,
            on_progress=lambda stage, done, total: on_progress(done, total),
        )
    return {
        "KL divergence, mean, nats": result.mean_kld,
        "KL divergence, largest, nats": result.max_kld,
        "same most likely token, share": result.top1_agreement,
        "positions": float(result.protocol.scored_tokens),
    }


def _show(report: Inspection, tensors: Rows) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for line in _summary(report):
        console.print(line, markup=False)
    modules: Rows = [
        (row.role, row.layers, row.scheme, _shape(row.shape), _number(row.bytes_per_group), _megabytes(row.num_bytes))
        for row in report.modules
    ]
    others: Rows = [
        (row.role, row.layers, row.dtype, _shape(row.shape), _megabytes(row.num_bytes)) for row in report.others
    ]
    for headings, rows in ((_MODULES, modules), (_OTHERS, others), (_TENSORS, tensors)):
        if rows:
            print_table(console, headings, rows)
    console.print()
    for line in _kv_line(report), *_problem_lines(report):
        console.print(line, markup=False)


def _summary(report: Inspection) -> list[str]:
    files = "1 file" if report.num_files == 1 else f"{report.num_files} files"
    lines = [report.path, f"format      {report.format}, {_megabytes(report.num_bytes)} MB in {files}"]
    if report.model:
        lines += _model_lines(report.family, report.model)
    if report.num_parameters is not None:
        lines.append(
            f"parameters  {report.num_parameters:,}; {report.bits_per_weight:.3f} bits a weight "
            f"({report.linear_bits_per_weight:.3f} in the linear layers)"
        )
    return lines


def _model_lines(family: str | None, model: dict[str, Any]) -> list[str]:
    tied = ", tied" if model["tie_word_embeddings"] else ""
    return [
        f"model       {family}, {model['num_layers']} layers, hidden {model['hidden_size']}, "
        f"feed-forward {model['intermediate_size']}",
        f"attention   {model['num_heads']} heads of {model['head_dim']}, {model['num_kv_heads']} for keys and values; "
        f"rope {model['rope_theta']:g} {model['rope_scaling']}, context {model['max_position_embeddings']}",
        f"vocabulary  {model['vocab_size']}{tied}",
    ]


def _kv_line(report: Inspection) -> str:
    scales = report.kv_scales
    if scales is None:
        return "KV-cache scales: none"
    if scales.smallest is None or scales.largest is None:
        return f"KV-cache scales: {scales.count}, none of them finite"
    return f"KV-cache scales: {scales.count}, from {scales.smallest:g} to {scales.largest:g}"


def _problem_lines(report: Inspection) -> list[str]:
    if not report.problems:
        return ["problems: none"]
    return [f"problems: {len(report.problems)}", *(f"  - {one_line(problem)}" for problem in report.problems)]


def print_table(console: Console, headings: Sequence[str], rows: Rows) -> None:
    """A rich table on a terminal, aligned columns elsewhere."""
    numeric = {"bytes/group", "MB", "bytes"}
    rows = [tuple(map(one_line, row)) for row in rows]  # values out of configs may hold anything
    console.print()
    if console.is_terminal:
        table = Table()
        for heading in headings:
            table.add_column(heading, justify="right" if heading in numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # names are no markup
        console.print(table, soft_wrap=False)
        return
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    for row in (tuple(headings), *rows):
        cells = [
            cell.rjust(width) if heading in numeric else cell.ljust(width)
            for cell, width, heading in zip(row, widths, headings, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _tensor_rows(checkpoint: Checkpoint) -> Rows:
    return [
        (info.name, str(info.dtype).removeprefix("torch."), _shape(info.shape), str(info.nbytes), info.file.name)
        for info in checkpoint.tensors.values()
    ]


def _tensor_dicts(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [
        {
            "name": info.name,
            "dtype": str(info.dtype).removeprefix("torch."),
            "shape": list(info.shape),
            "num_bytes": info.nbytes,
            "file": info.file.name,
        }
        for info in checkpoint.tensors.values()
    ]


def _shape(shape: Sequence[int] | None) -> str:
    return "?" if shape is None else "x".join(map(str, shape)) or "scalar"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
