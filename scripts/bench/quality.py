"""Convert the off-grid sample model with efforts and solvers and measure the results on texts that were never seen.

Calibration is State of the Union addresses, evaluation Wikipedia articles and whatever else is given. Every step is the
command that a user runs, in a process of its own, so time and peak memory are the command's. Rows may also name other
libraries, which quantize the same base on the same windows (quality_peers.py lists them), and checkpoints that are
there already can be put beside them. Ends with one JSON line.
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
from quality_peers import PEERS, PeerError, quantize  # noqa: E402

from aphroquant.calibration.data import calibration_windows  # noqa: E402
from aphroquant.calibration.effort import DEFAULT_EFFORT, EFFORTS, find_effort  # noqa: E402
from aphroquant.checkpoint import open_checkpoint  # noqa: E402

COLUMNS = "{:>5}  {:>12}  {:>6}  {:>10}  {:>9}  {:>7}  {:>7}  {:>8}  {:>8}  {:>7}  {:>6}"
HEADINGS = ("bits", "row", "bpw", "text", "mean KLD", "+-", "p99.9", "top-1", "ppl", "seconds", "MiB")
PLAIN = "rtn-plain"  # minimum and maximum, no data
ROTATED = "+rotate"  # behind an effort or a solver
FIGURES = ("mean_kld", "mean_kld_stderr", "p999_kld", "top1_agreement", "perplexity", "base_perplexity")


@click.command()
@click.option(
    "--rows",
    default=f"{PLAIN},gptq,{','.join(EFFORTS)}",
    show_default=True,
    help=f"Efforts, solvers (+rotate behind one: with --rotate), and the libraries {', '.join(PEERS)}.",
)
@click.option("--here", is_flag=True, help="Run libraries in this environment instead of ones made for them.")
@click.option("--to", default="gptq", show_default=True)
@click.option("--bits", default="4,4s,3,2", show_default=True, help="Bit widths; s behind one: symmetric.")
@click.option("--schemes", help="Schemes of the format by name, instead of bits: nvfp4a16,mxfp4a16.")
@click.option("--group-size", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path), help="Default: State of the Union addresses.")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), help="Further evaluation texts.")
@click.option("--checkpoint", "others", multiple=True, metavar="NAME=DIR", help="Measure what is there already, too.")
@click.option("--device", default="auto", show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Leave the checkpoints in this folder.")
def main(
    rows: str,
    here: bool,
    to: str,
    bits: str,
    schemes: str | None,
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
        for width in (schemes or bits).split(","):
            for row in rows.split(","):
                out = folder / f"{row}-{width}"
                text = calibration or calibration_text()
                if row in PEERS and not schemes:
                    if not _by_peer(row, width, group_size, base, out, text, seed, device, here):
                        continue
                else:
                    numbers = ["--scheme", width] if schemes else _integers(width, group_size)
                    setting = ["--to", to, *numbers, "--device", device, *_choice(row, text, seed)]
                    files = ["--out", str(out), "--json", str(_report(out, "convert")), "--overwrite"]
                    _aphroquant("convert", str(base), *files, *setting)
                measured += _measure(width, row, out, base, evaluated_on, device)
        for other in others:
            name, _, path = other.partition("=")
            measured += _measure("-", name, Path(path), base, evaluated_on, device)
        click.echo(json.dumps({"rows": measured, "cpu": platform.processor(), "torch": torch.__version__}))


def _integers(width: str, group_size: int) -> list[str]:
    sign = "--symmetric" if width.endswith("s") else "--asymmetric"
    return ["--bits", width.rstrip("s"), "--group-size", str(group_size), sign]


def _by_peer(
    row: str, width: str, group_size: int, base: Path, out: Path, text: Path, seed: int, device: str, here: bool
) -> bool:
    """Let a library quantize the base; False if it cannot do this width, or fails, which is told."""
    bits, symmetric = int(width.rstrip("s")), width.endswith("s")
    if not PEERS[row].can(bits, symmetric):
        return False
    samples = find_effort(DEFAULT_EFFORT).samples
    tokenizer = open_checkpoint(base).tokenizer()
    windows = calibration_windows(tokenizer, [text], samples=samples, seq_len=512, seed=seed).windows
    on = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    request = {"base": str(base), "out": str(out), "bits": bits, "group_size": group_size, "symmetric": symmetric}
    try:
        told = quantize(row, {**request, "token_ids": windows.tolist(), "device": on}, here=here)
    except PeerError as error:
        click.echo(str(error), err=True)
        return False
    _report(out, "convert").write_text(json.dumps(told))
    return True


def _report(out: Path, kind: str) -> Path:
    """Beside a checkpoint."""
    return out.with_name(f"{out.name}.{kind}.json")


def _choice(row: str, calibration: Path, seed: int) -> list[str]:
    """The options that make a row."""
    if row == PLAIN:
        return ["--solver", "rtn", "--samples", "0"]
    name = row.removesuffix(ROTATED)
    choice = ["--effort", name] if name in EFFORTS else ["--solver", name]
    rotation = ["--rotate"] if name != row else []
    return [*choice, *rotation, "--calibration", str(calibration), "--seed", str(seed)]


def _measure(width: str, row: str, out: Path, base: Path, texts: Sequence[Path], device: str) -> list[dict[str, Any]]:
    """One line a text."""
    converted = _report(out, "convert")
    conversion = json.loads(converted.read_text()) if converted.exists() else {}
    found = []
    for text in texts:
        report = _report(out, text.stem)
        arguments = ["--against", str(base), "--text", str(text), "--device", device, "--json", str(report)]
        _aphroquant("eval", str(out), *arguments)
        evaluation = json.loads(report.read_text())
        line = {
            "bits": width,
            "row": row,
            "text": text.stem,
            **{figure: evaluation[figure] for figure in FIGURES},
            "bits_per_weight": evaluation["size"]["linear_bits_per_weight"],
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
