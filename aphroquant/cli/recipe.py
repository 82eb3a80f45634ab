"""aphroquant recipe: write, check and show what a pipeline does."""

from __future__ import annotations

from pathlib import Path

import click

from aphroquant.errors import InputError, UsageError

_RECIPE = click.argument("recipe", metavar="RECIPE")


@click.group(name="recipe", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Recipes say in one YAML file what `pipeline run` makes, measures, gates and publishes.

    RECIPE is a file, or the name of one that ships with aphroquant (recipe list).
    """


@command.command("list")
def list_recipes() -> None:
    """Name the recipes that ship with aphroquant."""
    from aphroquant.recipes.loading import read_recipe, shipped_names

    names = shipped_names()
    width = max(map(len, names))
    for name in names:
        click.echo(f"{name:<{width}}  {read_recipe(name).recipe.description}")


@command.command()
@click.argument("name", default="awq-4bit", metavar="[NAME]")
@click.option("--source", metavar="SOURCE", help="The model that the recipe is for: a directory, .gguf file or Hub id.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Default: standard output.")
def init(name: str, source: str | None, out: Path | None) -> None:
    """Write a shipped recipe (default: awq-4bit) as a file to start from."""
    from aphroquant.recipes.loading import load_recipe, read_recipe
    from aphroquant.recipes.printing import with_source

    text = read_recipe(name).text
    text = text if source is None else with_source(text, source)
    load_recipe(text, name)
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"--out {out} exists", hint="give another name, or remove it") from error
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}") from error
    click.echo(f"wrote {out}", err=True)


@command.command()
@_RECIPE
@click.option("--source", metavar="SOURCE", help="In place of the recipe's.")
def validate(recipe: str, source: str | None) -> None:
    """Check RECIPE: its keys and values, what its outputs ask for, and that its texts are there."""
    from aphroquant.recipes.loading import read_recipe, require_source
    from aphroquant.recipes.requests import check_files, requests_of

    loaded = read_recipe(recipe)
    checked = loaded.recipe.model_copy(update={"source": source or loaded.recipe.source or "the source"})
    require_source(checked, recipe)
    places = {name: Path(output.out or name) for name, output in checked.outputs.items()}
    requests_of(checked, places, loaded.directory)
    problems: list[str] = []
    check_files(checked, loaded.directory, problems.append)
    for problem in problems[1:]:
        click.echo(f"error: {recipe}: {problem}", err=True)
    if problems:
        raise InputError(f"{recipe}: {problems[0]}")
    count = len(checked.outputs)
    click.echo(f"{recipe}: {count} output{'' if count == 1 else 's'}: {', '.join(checked.outputs)}")


@command.command()
@click.argument("recipe", metavar="[RECIPE]", required=False)
@click.option("--resolved", is_flag=True, help="With every default written out.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes, for editors.")
def show(recipe: str | None, resolved: bool, schema: bool) -> None:
    """Print RECIPE."""
    from aphroquant.recipes.loading import read_recipe
    from aphroquant.recipes.printing import dumped, schema_text

    if schema:
        click.echo(schema_text(), nl=False)
        return
    if recipe is None:
        raise UsageError("no recipe is given", hint="aphroquant recipe list names those that ship with it")
    loaded = read_recipe(recipe)
    click.echo(dumped(loaded.recipe.model_dump(mode="json", by_alias=True)) if resolved else loaded.text, nl=False)
