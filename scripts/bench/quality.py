"""Convert the off-grid sample model with efforts and solvers and measure the results on texts that were never seen.

Calibration is State of the Union addresses, evaluation Wikipedia articles and whatever else is given. Every step is the
command that a user runs, in a process of its own, so time and peak memory are the command's. Checkpoints that other
libraries made of the base (--keep leaves it as FOLDER/base) can be put beside them. Ends with one JSON line.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench")]

from fetch_sample import calibration_text, evaluation_text, sample_model  # noqa: E402
from off_grid import write_off_grid  # noqa: E402

from aphroquant.calibration.effort import EFFORTS  # noqa: E402

COLUMNS = "{:>5}  {:>12}  {:>6}  {:>10}  {:>9}  {:>7}  {:>7}  {:>8}  {:>8}  {:>7}  {:>6}"
HEADINGS = ("bits", "row", "bpw", "text", "mean KLD", "+-", "p99.9", "top-1", "ppl", "seconds", "MiB")
PLAIN = "rtn-plain"  # minimum and maximum, no data
FIGURES = ("mean_kld", "mean_kld_stderr", "p999_kld", "top1_agreement", "perplexity", "base_perplexity")


@click.command()
@click.option("--rows", default=f"{PLAIN},gptq,{','.join(EFFORTS)}", show_default=True, help="Efforts and solvers.")
@click.option("--to", default="gptq", show_default=True)
@click.option("--bits", default="4,4s,3,2", show_default=True, help="Bit widths; s behind one: symmetric.")
@click.option("--group-size", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path), help="Default: State of the Union addresses.")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), help="Further evaluation texts.")
@click.option("--checkpoint", "others", multiple=True, metavar="NAME=DIR", help="Measure what is there already, too.")
@click.option("--device", default="auto", show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Leave the checkpoints in this folder.")
def main(
    rows: str,
    to: str,
    bits: str,
    group_size: int,
    seed: int,
    calibration: Path | None,
    texts: tuple[Path, ...],
    others: tuple[str, ...],
    device: str,
    keep: Path | None,
) -> None:
    """Print a table of quality, seconds and peak memory."""
    evaluated_on = [evaluation_text(), *texts]
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        base = folder / "base"
        write_off_grid(sample_model(), base)
        click.echo(COLUMNS.format(*HEADINGS))
        measured = []
        for width in bits.split(","):
            for row in rows.split(","):
                setting = ["--to", to, "--bits", width.rstrip("s"), "--group-size", str(group_size)]
                setting += ["--symmetric" if width.endswith("s") else "--asymmetric", "--device", device]
                setting += _choice(row, calibration or calibration_text(), seed)
                out = folder / f"{row}-{width}"
                files = ["--out", str(out), "--json", str(out.with_suffix(".convert.json")), "--overwrite"]
                _aphroquant("convert", str(base), *files, *setting)
                measured += _measure(width, row, out, base, evaluated_on, device)
        for other in others:
            name, _, path = other.partition("=")
            measured += _measure("-", name, Path(path), base, evaluated_on, device)
        click.echo(json.dumps({"rows": measured, "cpu": platform.processor(), "torch": torch.__version__}))


def _choice(row: str, calibration: Path, seed: int) -> list[str]:
    """The options that make a row."""
    if row == PLAIN:
        return ["--solver", "rtn", "--samples", "0"]
    choice = ["--effort", row] if row in EFFORTS else ["--solver", row]
    return [*choice, "--calibration", str(calibration), "--seed", str(seed)]


def _measure(width: str, row: str, out: Path, base: Path, texts: Sequence[Path], device: str) -> list[dict[str, Any]]:
    """One line a text."""
    converted = out.with_suffix(".convert.json")
    conversion = json.loads(converted.read_text()) if converted.exists() else {}
    found = []
    for text in texts:
        report = out.with_suffix(f".{text.stem}.json")
        arguments = ["--against", str(base), "--text", str(text), "--device", device, "--json", str(report)]
        _aphroquant("eval", str(out), *arguments)
        evaluation = json.loads(report.read_text())
        line = {
            "bits": width,
            "row": row,
            "text": text.stem,
            **{figure: evaluation[figure] for figure in FIGURES},
            "bits_per_weight": conversion.get("bits_per_weight"),
            "seconds": conversion.get("seconds"),
            "peak_memory_mib": conversion["peak_memory_bytes"] / 2**20 if conversion else None,
        }
        click.echo(_line(line))
        found.append(line)
    return found


def _aphroquant(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "aphroquant", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"aphroquant {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")


def _line(row: dict[str, Any]) -> str:
    return COLUMNS.format(
        row["bits"],
        row["row"],
        _number(row["bits_per_weight"], ".3f"),
        row["text"][:10],
        f"{row['mean_kld']:.4f}",
        f"{row['mean_kld_stderr']:.4f}",
        f"{row['p999_kld']:.2f}",
        f"{row['top1_agreement']:.2%}",
        f"{row['perplexity']:.2f}",
        _number(row["seconds"], ".0f"),
        _number(row["peak_memory_mib"], ".0f"),
    )


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


if __name__ == "__main__":
    main()
