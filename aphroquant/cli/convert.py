"""aphroquant convert: quantize a checkpoint, or repack one that is quantized already."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from aphroquant.calibration.effort import DEFAULT_EFFORT, EFFORTS
from aphroquant.cli.byte_amount import ByteAmount
from aphroquant.cli.json_report import STANDARD_OUTPUT, check_json_target, write_json
from aphroquant.conversion.progress import Progress
from aphroquant.errors import UsageError

if TYPE_CHECKING:
    from aphroquant.conversion import ConversionResult

_SECONDS_BETWEEN_LINES = 1.0
TARGETS = (
    "awq",
    "gptq",
    "fp8",
    "compressed-tensors",
    "gguf",
    "auto-round",
    "hqq",
    "modelopt",
    "bitsandbytes",
    "aqlm",
    "mxfp4",
)


class _Bits(click.ParamType[int | float]):
    """A whole number of bits, or, with a point, an average."""

    name = "number"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        if isinstance(value, int | float):
            return value
        try:
            return float(value) if "." in value else int(value)
        except ValueError:
            self.fail(f"{value!r} is no number of bits; write 4, or 3.5 for an average", param, ctx)


@click.command()
@click.argument("source")
@click.option("--to", required=True, metavar="|".join(TARGETS), help="Format of the output.")
@click.option(
    "--out",
    required=True,
    metavar="PATH",
    help="Directory to make; for gguf also a file.",
)
@click.option(
    "--bits",
    type=_Bits(),
    help="Bits of a weight. With a point (3.5, 4.0): their average, scales and zero points included, for which each "
    "layer gets bits of its own. Default: 4.",
)
@click.option(
    "--size", type=ByteAmount(), help="The same for all tensors together, such as 2.5GiB, in place of --bits."
)
@click.option(
    "--group-size", type=int, help="Weights that share a scale; -1: a whole row. Default: 128, 64 or 32, what fits."
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Without or with zero points. Default: with, but for compressed-tensors without.",
)
@click.option(
    "--scheme",
    metavar="NAME",
    help="w4a16, w8a16, w8a8-int8, w8a8-int8-static, fp8-dynamic, fp8-static, fp8-block, nvfp4, mxfp4 (inputs too) "
    "or nvfp4a16, mxfp4a16; bitsandbytes: int8, nf4, fp4, nf4-dq, fp4-dq; aqlm: aqlm-2x8, aqlm-1x16 or as 4x8g16; "
    "gguf: q4_k_m, q5_k_m or a type: q4_0, q6_k ...",
)
@click.option(
    "--effort",
    default=DEFAULT_EFFORT,
    show_default=True,
    metavar="|".join(EFFORTS),
    help="How much work (times are of a 135M model): "
    + "; ".join(f"{effort.name} {effort.cost}" for effort in EFFORTS.values())
    + ".",
)
@click.option(
    "--solver",
    metavar="rtn|mse|hqq|gptq|awq|awq-gptq|awq-gptaq|awq-yaqa|smoothquant",
    help="How to choose numbers; mse and hqq use no data. Default: by --effort; smoothquant for w8a8-int8.",
)
@click.option(
    "--calibration",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text, or JSONL with messages, text, or prompt and response; repeatable; default: the bundled texts.",
)
@click.option("--weights", multiple=True, type=float, metavar="N", help="Share of the windows; one for each text.")
@click.option(
    "--packing",
    default="stream",
    show_default=True,
    metavar="stream|documents",
    help="Where windows begin: anywhere, or where a text or conversation does.",
)
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Jinja file in place of the model's own template; none: contents joined as they are.",
)
@click.option("--samples", type=int, help="Windows of calibration text; 0: none (rtn only). Default: by --effort.")
@click.option("--seq-len", default=512, show_default=True, help="Tokens in a window.")
@click.option("--seed", default=0, show_default=True, help="Chooses the windows.")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Modules that stay as they are; repeatable.")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="'WHICH: WHAT'",
    help="Something else for some modules: 'down_proj: bits=8', 'layers[0:2]: keep'; repeatable, the last that matches "
    "decides. WHICH is a pattern as for --ignore, a role (attention, mlp, q, ... down, experts, lm_head), "
    "layers[...] or layers[...].ROLE; WHAT sets scheme, bits, group_size, symmetric, solver or keep.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="What calibrates and solves; auto is a GPU if there is one.",
)
@click.option("--refine-steps", type=int, metavar="N", help="Steps of training each block. Default: by --effort.")
@click.option("--distill-steps", type=int, metavar="N", help="Steps of training the model. Default: by --effort.")
@click.option(
    "--job",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="What is done so far, for the same command to go on from after a kill. Default: .NAME.job beside PATH.",
)
@click.option(
    "--workers",
    default="1",
    show_default=True,
    metavar="N|auto|ray...",
    help="Processes that share the calibration (auto: one for each GPU), or a Ray cluster that solves layers: ray:N on "
    "this machine, ray://HOST:PORT. The output does not depend on it where processors are alike.",
)
@click.option("--no-job", is_flag=True, help="Keep nothing of a conversion that is killed.")
@click.option("--kv-scales", is_flag=True, help="Find scales for an FP8 KV cache, and store them with the weights.")
@click.option(
    "--rotate", is_flag=True, help="Rotate the channels of a dense model first: the same function, fewer outliers."
)
@click.option("--threads", type=click.IntRange(min=1), help="Processor threads to use. Default: all.")
@click.option(
    "--requantize", is_flag=True, help="Allow a loss: quantize anew what is quantized already and cannot stay as it is."
)
@click.option("--print-recipe", is_flag=True, help="Print the recipe that means the same (see recipe), and stop.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and stop.")
@click.option("--json", "json_file", metavar="FILE", help="Write the report here too; - for standard output.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint or file at PATH.")
def command(
    source: str,
    job: Path | None,
    workers: str,
    no_job: bool,
    threads: int | None,
    print_recipe: bool,
    dry_run: bool,
    json_file: str | None,
    **options: Any,
) -> None:
    """Convert SOURCE (a directory, a .gguf file or a Hub id) into PATH.

    A dense SOURCE is quantized. One that is quantized already is repacked without loss, each layer compared bit for
    bit; if the target format cannot hold its numbers, or options ask for others, --requantize has to allow the loss.
    PATH appears only when it is complete.
    """
    check_json_target(json_file)
    if job is not None and no_job:
        raise UsageError("--job and --no-job contradict each other", hint="give one of them")
    if print_recipe:
        from aphroquant.conversion.arguments import make_request
        from aphroquant.conversion.asked import check_asked
        from aphroquant.recipes.printing import recipe_text

        request = make_request(source, **options)
        check_asked(request)
        click.echo(recipe_text(request, threads), nl=False)
        return
    from aphroquant.conversion import convert

    if threads is not None:
        import torch

        torch.set_num_threads(min(threads, os.cpu_count() or 1))  # thousands crash its thread pool
    with removing_on_sigterm(), conversion_progress() as progress:
        options |= {"job": False if no_job else job, "workers": workers}
        result = convert(source, dry_run=dry_run, progress=progress, **options)
    if json_file != STANDARD_OUTPUT:
        click.echo(_summary(result))
    if json_file is not None:
        write_json(json_file, result.to_dict())


def _summary(result: ConversionResult) -> str:
    """The result in words, one fact a line."""
    share = result.num_bytes / result.source_bytes if result.source_bytes else 0.0
    facts = {
        "would write" if result.dry_run else "wrote": result.out,
        "format": f"{result.to}, {result.scheme}",
        "numbers": result.outcome,
        "solver": result.solver or "none needed",
        "modules": f"{result.num_modules} quantized, {result.bits_per_weight:.3f} bits per weight",
        "tensors": f"{result.num_bytes:,} bytes ({share:.1%} of the source's {result.source_bytes:,})",
    }
    if result.mean_relative_error is not None:
        facts["output error"] = f"{result.mean_relative_error:.2e} of a layer's output, mean over modules, squared"
    if result.weight_relative_error is not None:
        facts["weight error"] = f"{result.weight_relative_error:.2e} of the weights, squared"
    if not result.dry_run:
        facts["time"] = f"{result.seconds:.1f} s"
        facts["peak memory"] = f"{result.peak_memory_bytes / 2**20:,.0f} MiB"
    if result.warnings:
        facts["warnings"] = str(len(result.warnings))
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


@contextmanager
def removing_on_sigterm() -> Iterator[None]:
    """SIGTERM as an exception, so that what is half written is removed. The exit code is the usual one, 143."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may choose what a signal does
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def conversion_progress() -> Iterator[Progress]:
    """Bars on a terminal, plain lines elsewhere; always on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=console) as bars:
        yield _BarProgress(bars)


class _PlainProgress(Progress):
    """One line a stage and a block; of quick blocks, one now and then."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._told = 0  # blocks, in the last line

    def stage(self, text: str) -> None:
        self._started = self._last = time.monotonic()
        self._told = 0
        click.echo(text, err=True)

    def block(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done != self._told and (done == total or now - self._last >= _SECONDS_BETWEEN_LINES):
            elapsed = now - self._started
            click.echo(f"{done}/{total}  {elapsed:.1f} s  {elapsed / done * (total - done):.0f} s left", err=True)
            self._last, self._told = now, done

    def note(self, text: str) -> None:
        click.echo(f"note: {text}", err=True)

    def warn(self, text: str) -> None:
        click.echo(f"warning: {text}", err=True)


class _BarProgress(Progress):
    """One bar, whose label is the stage."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task = bars.add_task("planning", total=None)

    def stage(self, text: str) -> None:
        self._bars.update(self._task, description=text)

    def block(self, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._bars.console.print(f"note: {text}", markup=False, highlight=False)

    def warn(self, text: str) -> None:
        self._bars.console.print(f"warning: {text}", markup=False, highlight=False)
