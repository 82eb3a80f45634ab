"""aphroquant plan: what a conversion will give, need and take, before it is begun."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import click

from aphroquant.cli.convert import command as convert_command
from aphroquant.cli.json_report import STANDARD_OUTPUT, check_json_target, write_json
from aphroquant.errors import UsageError

# How the work is done, or what becomes of the output: options that are no part of the request.
_NOT_OF_A_PLAN = ("job", "no_job", "workers", "json_file", "dry_run", "overwrite", "print_recipe")
_PLACE = "out"  # what the outputs are planned for if no --out is given: this disk


def _convert_options() -> list[click.Parameter]:
    """Those of convert, of which none is required here: a recipe may say it all."""
    options = [copy.copy(option) for option in convert_command.params if option.name not in _NOT_OF_A_PLAN]
    for option in options:
        option.required = False
    return options


@click.command(params=_convert_options())
@click.option("--recipe", metavar="RECIPE", help="All outputs of a recipe, in place of convert's options.")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="How it fits there: h100-80g, l4-24g; repeatable.")
@click.option("--tensor-parallel", default=1, show_default=True, metavar="N", help="GPUs that share one model.")
@click.option("--probe/--no-probe", "tries", default=True, show_default=True, help="Measure: time, memory.")
@click.option("--json", "json_file", metavar="FILE", help="Write the plan here too; - for standard output.")
def command(
    recipe: str | None,
    gpus: tuple[str, ...],
    tensor_parallel: int,
    tries: bool,
    json_file: str | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Say what converting SOURCE will give and take: the options are those of convert, and mean the same.

    Told are sizes, engines that load the outputs, layers that do not divide, room for the KV cache on GPUs, disk, time
    and memory. The last two are measured by converting one or two blocks of the model. Nothing is written but
    temporary files.
    """
    check_json_target(json_file)
    from aphroquant.planning.gpus import find_gpu
    from aphroquant.planning.plan import plan
    from aphroquant.planning.report import plan_text

    places = [find_gpu(name) for name in gpus]
    requests = [_request(options)] if recipe is None else _requests_of(recipe, options["source"])
    if threads is not None:
        import torch

        torch.set_num_threads(min(threads, os.cpu_count() or 1))
    found = plan(requests, gpus=places, tensor_parallel=tensor_parallel, tries=tries)
    if json_file != STANDARD_OUTPUT:
        click.echo(plan_text(found))
    if json_file is not None:
        write_json(json_file, found.to_dict())


def _request(options: dict[str, Any]) -> Any:
    from aphroquant.conversion.arguments import make_request

    if options["source"] is None:
        raise UsageError("SOURCE is missing", hint="give a directory, a .gguf file or a Hub id, or --recipe")
    if options["to"] is None:
        raise UsageError("--to is missing", hint="give the format of the output, as to convert")
    out = options.pop("out") or str(Path.cwd() / _PLACE)
    return make_request(options.pop("source"), out=out, **options)


def _requests_of(given: str, source: str | None) -> list[Any]:
    from aphroquant.recipes.loading import read_recipe, require_source
    from aphroquant.recipes.requests import requests_of

    loaded = read_recipe(given)
    recipe, directory = loaded.recipe, loaded.directory
    if source is not None:
        place = Path(source)
        named = str(place.absolute()) if place.exists() else source
        recipe = recipe.model_copy(update={"source": named})
    require_source(recipe, loaded.name)
    suffixes = {name: ".gguf" if output.to == "gguf" else "" for name, output in recipe.outputs.items()}
    places = {name: Path.cwd() / f"{name}{suffix}" for name, suffix in suffixes.items()}
    return list(requests_of(recipe, places, directory).values())
