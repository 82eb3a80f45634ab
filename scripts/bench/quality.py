"""Convert the off-grid sample model with each solver at one setting and measure the results on held-out text.

Calibration is State of the Union addresses, evaluation Wikipedia articles. Every step is the command that a user runs,
in a process of its own, so time and peak memory are the command's. Ends with one JSON line.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench")]

from fetch_sample import calibration_text, evaluation_text, sample_model  # noqa: E402
from off_grid import write_off_grid  # noqa: E402

COLUMNS = "{:>10}  {:>9}  {:>7}  {:>8}  {:>8}  {:>7}  {:>9}  {:>8}"


@click.command()
@click.option("--solvers", default="rtn,gptq,awq,awq-gptq", show_default=True)
@click.option("--to", default="awq", show_default=True)
@click.option("--bits", default=4, show_default=True)
@click.option("--group-size", default=64, show_default=True)
@click.option("--symmetric", is_flag=True)
@click.option("--samples", default=128, show_default=True)
@click.option("--seq-len", default=512, show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Leave the checkpoints in this folder.")
def main(
    solvers: str, to: str, bits: int, group_size: int, symmetric: bool, samples: int, seq_len: int, keep: Path | None
) -> None:
    """Print a table of quality, seconds and peak memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        base = folder / "base"
        write_off_grid(sample_model(), base)
        click.echo(COLUMNS.format("solver", "mean KLD", "+-", "p99.9", "top-1", "ppl", "seconds", "MiB"))
        rows = []
        for name in ("rtn-plain", *solvers.split(",")):
            setting = ["--to", to, "--bits", str(bits), "--group-size", str(group_size)]
            setting += ["--symmetric"] * symmetric
            if name == "rtn-plain":  # minimum and maximum, no data
                setting += ["--solver", "rtn", "--samples", "0"]
            else:
                setting += ["--solver", name, "--samples", str(samples), "--seq-len", str(seq_len)]
                setting += ["--calibration", str(calibration_text())]
            rows.append(_measure(name, setting, base, folder / name))
            click.echo(_line(rows[-1]))
        click.echo(json.dumps({"rows": rows, "cpu": platform.processor(), "torch": torch.__version__}))


def _measure(name: str, setting: list[str], base: Path, out: Path) -> dict[str, Any]:
    converted, evaluated = out.with_suffix(".convert.json"), out.with_suffix(".eval.json")
    files = ["--out", str(out), "--json", str(converted), "--overwrite"]
    _aphroquant("convert", str(base), *files, "--requantize", *setting)
    text = str(evaluation_text())
    _aphroquant("eval", str(out), "--against", str(base), "--text", text, "--json", str(evaluated))
    conversion, evaluation = json.loads(converted.read_text()), json.loads(evaluated.read_text())
    figures = ("mean_kld", "mean_kld_stderr", "p999_kld", "top1_agreement", "perplexity", "base_perplexity")
    return {
        "solver": name,
        **{figure: evaluation[figure] for figure in figures},
        "seconds": conversion["seconds"],
        "peak_memory_mib": conversion["peak_memory_bytes"] / 2**20,
    }


def _aphroquant(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "aphroquant", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"aphroquant {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")


def _line(row: dict[str, Any]) -> str:
    return COLUMNS.format(
        row["solver"],
        f"{row['mean_kld']:.4f}",
        f"{row['mean_kld_stderr']:.4f}",
        f"{row['p999_kld']:.2f}",
        f"{row['top1_agreement']:.2%}",
        f"{row['perplexity']:.2f}",
        f"{row['seconds']:.0f}",
        f"{row['peak_memory_mib']:.0f}",
    )


if __name__ == "__main__":
    main()
