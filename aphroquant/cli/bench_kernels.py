"""aphroquant bench kernels: linear layers of named models, beside what the memory and the processor allow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aphroquant.errors import UsageError

if TYPE_CHECKING:
    from aphroquant.kernels.benchmark.measure import Ceilings, Measurement

_COLUMNS = f"{'layer':9}{'outputs x inputs':>17}{'M':>6}{'us':>10}{'GB/s':>8}{'TFLOP/s':>9}{'floor us':>10}{'share':>7}"
_MAX_ROWS = 1 << 20


@click.command()
@click.option("--scheme", "scheme_name", default="w4g128", show_default=True, help="w4g128, w8, w8a8, fp8, nf4 ...")
@click.option(
    "--shapes", default="llama-3-8b", show_default=True, help="Models or OUTPUTSxINPUTS, with commas between."
)
@click.option("--m", "rows", default="1,16,64,256", show_default=True, help="Numbers of rows, with commas between.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True, help="Of the inputs.")
@click.option("--backend", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option(
    "--activations",
    type=click.Choice(["int8", "float"]),
    default="int8",
    show_default=True,
    help="Inputs of weight-only integer layers on the CPU.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads (default: torch's).")
@click.option("--peers", type=click.Path(path_type=Path), metavar="DIR", help="Time the libraries in this folder too.")
@click.option("--json", "json_file", metavar="FILE", help="Write the last line here, too.")
def command(
    scheme_name: str,
    shapes: str,
    rows: str,
    dtype: str,
    backend: str,
    activations: str,
    threads: int | None,
    peers: Path | None,
    json_file: str | None,
) -> None:
    """Time linear layers with random weights of the real sizes.

    Weights rotate over copies larger than the cache, three times over; on a GPU a CUDA graph of all copies is replayed;
    each time is a median. The floor is what the bytes take at the measured read bandwidth, or the products at the
    measured rate, whichever is more. The error is that of the result against float64. The last line is JSON.
    """
    from aphroquant.cli.json_report import check_json_target, write_json
    from aphroquant.kernels.benchmark.layer_shapes import find_shapes
    from aphroquant.kernels.benchmark.scheme_names import scheme_of
    from aphroquant.kernels.cuda.device import obstacle

    check_json_target(json_file)
    counts, scheme = _counts(rows), scheme_of(scheme_name)
    models = {name: find_shapes(name) for name in dict.fromkeys(shapes.split(","))}
    kind = backend if backend != "auto" else "cpu" if obstacle() else "cuda"
    if peers is not None and kind == "cpu":
        raise UsageError("--peers is for a GPU")
    if threads is not None and kind == "cuda":
        raise UsageError("--threads is for the CPU")
    machine = _Gpu(dtype, peers) if kind == "cuda" else _Cpu(activations, threads)
    click.echo(f"{machine.describe()}\n{scheme}")
    found: list[dict[str, Any]] = []
    for model, layers in models.items():
        results = (result for layer in layers for result in machine.measure(layer, scheme, counts))
        found += [{"shapes": model, **measurement.to_dict()} for measurement in _show(model, results)]
    report = machine.to_dict() | {"scheme": scheme_name, "rows": found}
    click.echo(json.dumps(report))
    if json_file is not None:
        write_json(json_file, report)


class _Gpu:
    """Runs on the current GPU."""

    def __init__(self, dtype: str, peers: Path | None) -> None:
        import torch

        from aphroquant.kernels.benchmark.cuda_run import cuda_ceilings
        from aphroquant.kernels.benchmark.peers import check_peers
        from aphroquant.kernels.cuda.device import gpu, require

        require()
        if peers is not None:
            check_peers(peers)
        self._dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
        self._peers, self._name = peers, gpu(torch.cuda.current_device()).name
        self._ceilings: Ceilings = cuda_ceilings(self._dtype)

    def measure(self, layer: Any, scheme: Any, rows: list[int]) -> Iterator[Measurement | str]:
        from aphroquant.kernels.benchmark.cuda_run import measure_cuda
        from aphroquant.kernels.benchmark.expert_run import measure_experts
        from aphroquant.kernels.benchmark.expert_shapes import ExpertShape

        if isinstance(layer, ExpertShape):
            return measure_experts(layer, scheme, rows, self._dtype, self._ceilings, self._peers)
        return measure_cuda(layer, scheme, rows, self._dtype, self._ceilings, self._peers)

    def describe(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in self._ceilings.operations_per_second.items())
        return f"{self._name}: reads {self._ceilings.bytes_per_second / 1e9:.0f} GB/s, TFLOP/s {rates}"

    def to_dict(self) -> dict[str, Any]:
        return {"device": self._name, "dtype": str(self._dtype).removeprefix("torch.")} | _ceilings_dict(self._ceilings)


class _Cpu:
    """Runs on the compiled CPU library."""

    def __init__(self, activations: str, threads: int | None) -> None:
        import torch

        from aphroquant.kernels.benchmark.cpu_run import cpu_ceilings
        from aphroquant.kernels.dispatch import select_backend

        if threads is not None:
            torch.set_num_threads(threads)
        self._backend = select_backend("cpu", activations=activations)
        self._activations, self._threads = activations, torch.get_num_threads()
        self._ceilings: Ceilings = cpu_ceilings()

    def measure(self, layer: Any, scheme: Any, rows: list[int]) -> Iterator[Measurement | str]:
        from aphroquant.kernels.benchmark.cpu_run import measure_cpu, measure_experts_cpu
        from aphroquant.kernels.benchmark.expert_shapes import ExpertShape

        if isinstance(layer, ExpertShape):
            return measure_experts_cpu(layer, scheme, rows, self._backend, self._ceilings)
        return measure_cpu(layer, scheme, rows, self._backend, self._ceilings)

    def describe(self) -> str:
        return (
            f"CPU, {self._threads} threads, {self._backend.reason}: reads "
            f"{self._ceilings.bytes_per_second / 1e9:.1f} GB/s, inputs {self._activations}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": f"cpu ({self._backend.reason})",
            "threads": self._threads,
            "activations": self._activations,
        } | _ceilings_dict(self._ceilings)


def _ceilings_dict(ceilings: Ceilings) -> dict[str, Any]:
    return {
        "read_gb_per_s": round(ceilings.bytes_per_second / 1e9, 1),
        "product_tflops": {name: round(rate / 1e12, 2) for name, rate in ceilings.operations_per_second.items()},
    }


def _show(model: str, results: Iterable[Measurement | str]) -> list[Measurement]:
    """Print each result as it comes, then the sums over the layers of a model."""
    found: list[Measurement] = []
    click.echo(f"\n{model}\n{_COLUMNS}{'error':>9}  kernel")
    for result in results:
        if isinstance(result, str):
            click.echo(f"  {result}")
            continue
        found.append(result)
        error = "" if result.error is None else f"{result.error:.1e}"
        size = f"{result.out_features}x{result.in_features}"
        click.echo(
            f"{result.layer:9.9}{size:>17}{result.rows:6}{result.microseconds:10.2f}{result.gigabytes_per_second:8.0f}"
            f"{result.teraflops:9.2f}{result.floor_microseconds:10.2f}{result.share:7.1%}{error:>9}  {result.kernel}"
        )
    layers = {measurement.layer for measurement in found}
    sums: dict[tuple[int, str], list[Measurement]] = {}
    for measurement in found:
        sums.setdefault((measurement.rows, measurement.kernel), []).append(measurement)
    for (rows, kernel), parts in sorted(sums.items()):
        if len(parts) == len(layers) > 1:
            total, floor = sum(p.microseconds for p in parts), sum(p.floor_microseconds for p in parts)
            click.echo(f"{'all':9}{'':17}{rows:6}{total:10.2f}{'':17}{floor:10.2f}{floor / total:7.1%}{'':9}  {kernel}")
    return found


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--m {text} must be whole numbers with commas between") from None
    if bad := [count for count in counts if not 1 <= count <= _MAX_ROWS]:
        raise UsageError(f"--m {bad[0]} must be between 1 and {_MAX_ROWS}")
    return counts
