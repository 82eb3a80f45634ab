"""What a recipe asks the conversion for: one request an output, on the same calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from aphroquant.calibration.data import DEFAULT
from aphroquant.calibration.effort import find_effort
from aphroquant.calibration.records import NO_TEMPLATE
from aphroquant.conversion.asked import check_asked
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.rules import ModuleRule
from aphroquant.conversion.targets import check_known
from aphroquant.errors import AphroquantError
from aphroquant.recipes.models import Output, Recipe, Rule

_WORDS = (DEFAULT, NO_TEMPLATE)  # that stand for no file


def requests_of(recipe: Recipe, places: Mapping[str, Path], directory: Path | None) -> dict[str, ConversionRequest]:
    """By the outputs' names. `places` say where they are written; `directory` is what paths are relative to.

    UsageError naming the output that asks for what cannot be.
    """
    samples = _samples(recipe)
    found = {}
    for name, output in recipe.outputs.items():
        try:
            found[name] = _request(recipe, output, places[name], directory, samples if output.calibrates else 0)
            check_asked(found[name])
        except AphroquantError as error:
            raise type(error)(f"outputs.{name}: {error.message}", hint=error.hint) from error
    return found


def resolved(given: str, directory: Path | None) -> Path:
    """A path of a recipe in that directory; words that stand for no file stay as they are."""
    path = Path(given).expanduser()
    return path if directory is None or given in _WORDS or path.is_absolute() else directory / path


def resolved_source(given: str, directory: Path | None) -> str:
    """The source: in the recipe's directory if it is there, else as it is given (a path or a Hub id)."""
    beside = resolved(given, directory)
    return str(beside) if beside.exists() else given


def _request(recipe: Recipe, output: Output, place: Path, directory: Path | None, samples: int) -> ConversionRequest:
    assert recipe.source is not None
    check_known(output.to)
    calibration = recipe.calibration
    sources = calibration.sources
    template = calibration.chat_template
    return ConversionRequest(
        source=resolved_source(recipe.source, directory),
        to=output.to,
        out=place,
        scheme=output.scheme,
        bits=output.bits,
        size=None if output.size is None else int(output.size),
        group_size=output.group_size,
        symmetric=output.symmetric,
        solver=output.solver,
        calibration=tuple(resolved(source.path, directory) for source in sources) if output.calibrates else (),
        samples=samples,
        seq_len=calibration.seq_len,
        seed=calibration.seed,
        ignore=output.ignore,
        overwrite=output.overwrite,
        device=recipe.device,
        requantize=recipe.requantize,
        effort=output.effort,
        refine_steps=output.refine_steps,
        distill_steps=output.distill_steps,
        rotate=recipe.rotate,
        kv_scales=output.kv_scales,
        rules=tuple(map(_rule, output.rules)),
        weights=tuple(source.weight for source in sources if source.weight is not None) if output.calibrates else (),
        packing=calibration.packing,
        chat_template=None if template is None else resolved(template, directory),
    )


def _samples(recipe: Recipe) -> int:
    """The most that the effort of an output asks for, if the recipe does not say."""
    if recipe.calibration.samples is not None:
        return recipe.calibration.samples
    return max(find_effort(output.effort).samples for output in recipe.outputs.values())


def _rule(rule: Rule) -> ModuleRule:
    settings = rule.model_dump(exclude={"modules"})
    return ModuleRule(match=rule.modules, **settings)


def check_files(recipe: Recipe, directory: Path | None, complain: Callable[[str], None]) -> None:
    """Tell of each text that the recipe names and that is not there."""
    named = {f"calibration.sources[{i}].path": source.path for i, source in enumerate(recipe.calibration.sources)}
    if recipe.calibration.chat_template is not None:
        named["calibration.chat_template"] = recipe.calibration.chat_template
    if recipe.evaluation is not None:
        named |= {f"evaluation.texts.{name}": path for name, path in recipe.evaluation.texts.items()}
    for key, path in named.items():
        if path not in _WORDS and not resolved(path, directory).is_file():
            complain(f"{key}: there is no file {resolved(path, directory)}")
