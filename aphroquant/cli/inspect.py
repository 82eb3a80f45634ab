"""aphroquant inspect: what a checkpoint is made of, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aphroquant.cli.json_report import STANDARD_OUTPUT, check_json_target, write_json

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint
    from aphroquant.checkpoint.inspection import Inspection

Rows = list[tuple[str, ...]]
_MODULES = ("module", "layers", "scheme", "shape", "bytes/group", "MB")
_OTHERS = ("not quantized", "layers", "dtype", "shape", "MB")
_TENSORS = ("tensor", "dtype", "shape", "bytes", "file")


@click.command()
@click.argument("source", metavar="DIR_OR_FILE")
@click.option("--json", "json_file", metavar="FILE", help="Write the report here as JSON; - for standard output.")
@click.option("--tensors", is_flag=True, help="List every stored tensor too.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit, of a Hugging Face id.")
def command(source: str, json_file: str | None, tensors: bool, revision: str | None) -> None:
    """Show a checkpoint's format, model, schemes, sizes and problems.

    DIR_OR_FILE is a directory, a .gguf or .safetensors file, or a Hugging Face id. Problems are told and change no exit
    code; only a checkpoint that cannot be read does (3).
    """
    check_json_target(json_file)
    from aphroquant.checkpoint import open_checkpoint
    from aphroquant.checkpoint.inspection import inspect_checkpoint

    checkpoint = open_checkpoint(source, revision=revision)
    report = inspect_checkpoint(checkpoint)
    if json_file != STANDARD_OUTPUT:
        _show(report, _tensor_rows(checkpoint) if tensors else [])
    if json_file is not None:
        write_json(json_file, report.to_dict() | ({"tensors": _tensor_dicts(checkpoint)} if tensors else {}))


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
            _print_table(console, headings, rows)
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
    return [f"problems: {len(report.problems)}", *(f"  - {problem}" for problem in report.problems)]


def _print_table(console: Console, headings: Sequence[str], rows: Rows) -> None:
    """A rich table on a terminal, aligned columns elsewhere."""
    numeric = {"bytes/group", "MB", "bytes"}
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
