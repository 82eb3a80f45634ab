"""aphroquant bench engine: tokens a second of the whole engine, beside the same engine with unquantized weights."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from aphroquant.errors import UsageError

if TYPE_CHECKING:
    from aphroquant.engine.engine import Engine
    from aphroquant.engine.speed import EngineSpeed

MakeEngine = Callable[[], "Engine"]
_COLUMNS = f"{'scheme':12}{'batch':>6}{'context':>9}{'decode tok/s':>14}{'ms a step':>11}{'prefill tok/s':>15}"


@click.command()
@click.argument("model", metavar="[DIR]", required=False)
@click.option("--synthetic", metavar="NAME", help="Random weights in the shape of a known model, such as llama-3-8b.")
@click.option(
    "--scheme", default="w4g128", show_default=True, help="Of the synthetic weights: w4g128, w8, fp8, bf16 ..."
)
@click.option(
    "--batch", "batches", default="1,16,64", show_default=True, help="Answers at a time, with commas between."
)
@click.option("--context", default=1024, show_default=True, type=click.IntRange(1), help="Tokens of each prompt.")
@click.option("--steps", default=64, show_default=True, type=click.IntRange(1), help="Decode steps that are timed.")
@click.option("--kv-cache-dtype", default="auto", show_default=True, help="As of serve.")
@click.option("--baseline/--no-baseline", default=True, help="Measure synthetic bf16 weights, too.")
@click.option("--json", "json_file", metavar="FILE", help="Write the last line here, too.")
def command(
    model: str | None,
    synthetic: str | None,
    scheme: str,
    batches: str,
    context: int,
    steps: int,
    kv_cache_dtype: str,
    baseline: bool,
    json_file: str | None,
) -> None:
    """Measure the engine with a checkpoint in DIR, or with --synthetic weights on a GPU.

    Prompts are random, answers greedy. Figures include scheduling, sampling and text; the last line is JSON.
    """
    from aphroquant.cli.json_report import check_json_target, write_json

    check_json_target(json_file)
    if (model is None) == (synthetic is None):
        raise UsageError("give either DIR or --synthetic NAME", hint="for example --synthetic llama-3-8b")
    counts = _counts(batches)
    settings = {
        "kv_cache_dtype": kv_cache_dtype,
        "max_num_seqs": max(counts),
        "enable_prefix_caching": False,
        "max_model_len": None,
    }
    if synthetic is None:
        assert model is not None
        runs: dict[str, MakeEngine] = {"checkpoint": partial(_checkpoint_engine, model, settings)}
    else:
        schemes = [scheme, "bf16"] if baseline and scheme != "bf16" else [scheme]
        length = context + 2 * (steps + context + max(counts))
        settings["max_model_len"] = min(131072, length)
        runs = {name: _synthetic_maker(synthetic, name, settings) for name in schemes}
    click.echo(_COLUMNS)
    found: list[dict[str, Any]] = []
    for name, make in runs.items():
        engine = make()
        for speed in _measure(engine, counts, context, steps):
            click.echo(_row(name, speed))
            found.append({"scheme": name} | speed.to_dict())
        del engine
        gc.collect()
    report = {"model": synthetic or model, "device": _device(), "kv_cache_dtype": kv_cache_dtype, "rows": found}
    click.echo(json.dumps(report))
    if json_file is not None:
        write_json(json_file, report)


def _measure(engine: Engine, counts: list[int], context: int, steps: int) -> list[EngineSpeed]:
    from aphroquant.engine.speed import measure_engine

    vocab_size = engine.vocab_size
    measure_engine(engine, vocab_size=vocab_size, batch=1, context=context, steps=2)  # compiles what is new
    return [measure_engine(engine, vocab_size=vocab_size, batch=n, context=context, steps=steps) for n in counts]


def _synthetic_maker(name: str, scheme_name: str, settings: dict[str, Any]) -> MakeEngine:
    from aphroquant.engine.cuda.synthetic import synthetic_engine, synthetic_spec
    from aphroquant.kernels.benchmark.scheme_names import scheme_of

    synthetic_spec(name)
    scheme = scheme_of(scheme_name)
    return partial(synthetic_engine, name, scheme, settings)


def _checkpoint_engine(model: str, settings: dict[str, Any]) -> Engine:
    from aphroquant.engine.engine import Engine
    from aphroquant.engine.types import EngineConfig

    return Engine(EngineConfig(model=model, **settings))


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 1024 for part in parts):
        raise UsageError(f"--batch {text!r} must be numbers from 1 to 1024 with commas between, such as 1,16,64")
    return [int(part) for part in parts]


def _row(name: str, speed: EngineSpeed) -> str:
    return (
        f"{name:12}{speed.batch:6}{speed.context:9}{speed.decode_tokens_per_second:14.1f}"
        f"{speed.step_milliseconds:11.3f}{speed.prefill_tokens_per_second:15.0f}"
    )


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
