"""Convert the off-grid sample model with efforts and solvers and measure the results on texts that were never seen.

Calibration is State of the Union addresses, evaluation Wikipedia articles and whatever else is given. Every step is a
process of its own, so time and peak memory are the command's. Rows may also name other libraries, which quantize the
same base on the same windows (quality_peers.py lists them), and checkpoints that are there already can be put beside
them. All are measured by the same command, in float32 with dequantized weights. With --results each row is kept as a
file, is not measured again, and can be put into one table with rows of other machines (quality_table.py). Ends with
one JSON line; exit code 1 if a library failed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench")]

from cpu import cpu_name  # noqa: E402
from fetch_sample import calibration_text, evaluation_text, sample_model  # noqa: E402
from off_grid import write_off_grid  # noqa: E402
from quality_peers import PEERS, PeerError, Quantized, Spent, quantize, watched  # noqa: E402
from quality_rows import FIGURES, OtherConditionsError, Results, Row  # noqa: E402

from aphroquant import __version__  # noqa: E402
from aphroquant.calibration.data import calibration_windows  # noqa: E402
from aphroquant.calibration.effort import DEFAULT_EFFORT, EFFORTS, find_effort  # noqa: E402
from aphroquant.checkpoint import open_checkpoint  # noqa: E402

COLUMNS = "{:>5}  {:>16}  {:>6}  {:>10}  {:>9}  {:>7}  {:>7}  {:>8}  {:>8}  {:>7}  {:>6}"
HEADINGS = ("bits", "row", "bpw", "text", "mean KLD", "+-", "p99.9", "top-1", "ppl", "seconds", "MiB")
PLAIN = "rtn-plain"  # minimum and maximum, no data
ROTATED = "+rotate"  # behind an effort or a solver
SEQ_LEN = 512


@dataclass(frozen=True)
class Bench:
    """The settings that all rows share, and where things lie."""

    folder: Path
    to: str
    group_size: int
    seed: int
    samples: int | None
    calibration: Path
    texts: Sequence[Path]
    device: str
    here: bool
    by_schemes: bool

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def conditions(self) -> dict[str, Any]:
        """What two rows must have in common to stand in one table."""
        shared: dict[str, Any] = {"format": self.to, "group_size": self.group_size, "seed": self.seed}
        if self.samples is not None:
            shared["samples"] = self.samples
        return shared | {"calibration": self.calibration.name, "texts": [text.name for text in self.texts]}

    def row(self, width: str, name: str) -> Row:
        """Quantize and measure. PeerError if a process fails."""
        out = self.folder / f"{name}-{width}"
        made = self._by_peer(width, name, out) if name in PEERS else self._by_us(width, name, out)
        return self._measured(width, name, out, made)

    def measured_only(self, name: str, out: Path) -> Row:
        """Of a checkpoint that is there already."""
        return self._measured("-", name, out, None)

    def _by_us(self, width: str, name: str, out: Path) -> Quantized:
        numbers = ["--scheme", width] if self.by_schemes else _integers(width, self.group_size)
        report = out.with_name(f"{out.name}.convert.json")
        files = ["--out", str(out), "--json", str(report), "--overwrite"]
        setting = ["--to", self.to, *numbers, "--device", self.device, *self._choice(name)]
        return Quantized(_aphroquant("convert", str(self.base), *files, *setting), {"versions": _versions()})

    def _choice(self, row: str) -> list[str]:
        """The options that make a row."""
        if row == PLAIN:
            return ["--solver", "rtn", "--samples", "0"]
        name = row.removesuffix(ROTATED)
        choice = ["--effort", name] if name in EFFORTS else ["--solver", name]
        rotation = ["--rotate"] if name != row else []
        samples = [] if self.samples is None else ["--samples", str(self.samples)]
        return [*choice, *rotation, *samples, "--calibration", str(self.calibration), "--seed", str(self.seed)]

    def _by_peer(self, width: str, name: str, out: Path) -> Quantized:
        samples = self.samples or find_effort(DEFAULT_EFFORT).samples
        tokenizer = open_checkpoint(self.base).tokenizer()
        windows = calibration_windows(tokenizer, [self.calibration], samples=samples, seq_len=SEQ_LEN, seed=self.seed)
        request = {"base": str(self.base), "out": str(out), "bits": int(width.rstrip("s")), "device": self._on()}
        numbers = {"group_size": self.group_size, "symmetric": width.endswith("s")}
        return quantize(name, {**request, **numbers, "token_ids": windows.windows.tolist()}, here=self.here)

    def _measured(self, width: str, name: str, out: Path, made: Quantized | None) -> Row:
        texts, bits_per_weight = {}, 0.0
        model = next(out.glob("*.gguf"), out)
        for text in self.texts:
            report = out.with_name(f"{out.name}.{text.stem}.json")
            arguments = ["--against", str(self.base), "--text", str(text), "--device", self.device]
            _aphroquant("eval", str(model), *arguments, "--no-noise-floor", "--json", str(report))
            evaluation = json.loads(report.read_text())
            texts[text.stem] = {figure: evaluation[figure] for figure in FIGURES}
            bits_per_weight = evaluation["size"]["linear_bits_per_weight"]
        gpu_bytes = made.told.get("gpu_memory_bytes") if made else None
        return Row(
            bits=width,
            name=name,
            conditions=self.conditions(),
            machine=self._machine(),
            versions=made.told["versions"] if made else {},
            bits_per_weight=bits_per_weight,
            seconds=made.spent.seconds if made else None,
            processor_seconds=made.spent.processor_seconds if made else None,
            memory_mib=made.spent.memory_bytes / 2**20 if made else None,
            gpu_memory_mib=gpu_bytes / 2**20 if gpu_bytes else None,
            texts=texts,
        )

    def _on(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def _machine(self) -> str:
        """By its kind."""
        if self._on() == "cuda":
            return torch.cuda.get_device_name()
        return f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}"


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
@click.option(
    "--samples", type=click.IntRange(1), help="Calibration windows of every row. Default: as many as each takes."
)
@click.option("--calibration", type=click.Path(path_type=Path), help="Default: State of the Union addresses.")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), help="Further evaluation texts.")
@click.option("--checkpoint", "others", multiple=True, metavar="NAME=DIR", help="Measure what is there already, too.")
@click.option("--device", default="auto", show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Leave the checkpoints in this folder.")
@click.option("--results", type=click.Path(path_type=Path), help="Keep each row in this folder, and go on from there.")
def main(
    rows: str,
    here: bool,
    to: str,
    bits: str,
    schemes: str | None,
    group_size: int,
    seed: int,
    samples: int | None,
    calibration: Path | None,
    texts: tuple[Path, ...],
    others: tuple[str, ...],
    device: str,
    keep: Path | None,
    results: Path | None,
) -> None:
    """Print a table of quality, seconds and peak memory."""
    kept = Results(results)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            folder=(keep or Path(scratch)).resolve(),
            to=to,
            group_size=group_size,
            seed=seed,
            samples=samples,
            calibration=calibration or calibration_text(),
            texts=[evaluation_text(), *texts],
            device=device,
            here=here,
            by_schemes=schemes is not None,
        )
        write_off_grid(sample_model(), bench.base)
        click.echo(COLUMNS.format(*HEADINGS))
        measured, failed = [], 0
        for width, name in _cells((schemes or bits).split(","), rows.split(","), bench.by_schemes):
            try:
                row = kept.find(width, name, bench.conditions()) or bench.row(width, name)
            except PeerError as error:
                click.echo(str(error), err=True)
                failed += 1
                continue
            except OtherConditionsError as error:
                raise click.UsageError(str(error)) from error
            kept.keep(row)
            measured.append(row)
            _show(row)
        for other in others:
            name, _, path = other.partition("=")
            measured.append(bench.measured_only(name, Path(path)))
            _show(measured[-1])
    click.echo(json.dumps({"rows": list(map(asdict, measured)), "versions": _versions()}))
    sys.exit(1 if failed else 0)


def _cells(widths: Sequence[str], names: Sequence[str], by_schemes: bool) -> Iterator[tuple[str, str]]:
    """Width and row, without what a library cannot do."""
    for width in widths:
        for name in names:
            peer = PEERS.get(name)
            if peer is None or (not by_schemes and peer.can(int(width.rstrip("s")), width.endswith("s"))):
                yield width, name


def _integers(width: str, group_size: int) -> list[str]:
    sign = "--symmetric" if width.endswith("s") else "--asymmetric"
    return ["--bits", width.rstrip("s"), "--group-size", str(group_size), sign]


def _aphroquant(*arguments: str) -> Spent:
    """Our own command, which has to succeed."""
    try:
        return watched([sys.executable, "-m", "aphroquant", *arguments])
    except PeerError as error:
        sys.exit(str(error))


def _versions() -> Mapping[str, str]:
    return {"aphroquant": __version__, "torch": torch.__version__}


def _show(row: Row) -> None:
    """One line a text."""
    for text, figures in row.texts.items():
        cells = [
            row.bits,
            row.name,
            f"{row.bits_per_weight:.3f}",
            text[:10],
            f"{figures['mean_kld']:.4f}",
            f"{figures['mean_kld_stderr']:.4f}",
            f"{figures['p999_kld']:.2f}",
            f"{figures['top1_agreement']:.2%}",
            f"{figures['perplexity']:.2f}",
            "-" if row.seconds is None else f"{row.seconds:.0f}",
            "-" if row.memory_mib is None else f"{row.memory_mib:.0f}",
        ]
        click.echo(COLUMNS.format(*cells))


if __name__ == "__main__":
    main()
