"""The evaluation of a recipe: the outputs in one run against the source, and the figures put into their records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aphroquant.conversion.progress import Progress
from aphroquant.errors import UsageError
from aphroquant.evaluation.compare import evaluate_models
from aphroquant.evaluation.measure import stage_names
from aphroquant.evaluation.result import EvaluationRun
from aphroquant.evaluation.texts import DEFAULT
from aphroquant.pipeline.job import Job
from aphroquant.provenance.metrics import record_evaluation
from aphroquant.recipes.models import Recipe
from aphroquant.recipes.requests import resolved


class Measuring:
    """`inputs` are all that decides the figures beside the models; `names` the recipe's for the texts' own."""

    def __init__(self, recipe: Recipe, directory: Path | None, job: Job) -> None:
        assert recipe.evaluation is not None
        self._settings, self._device, self._job = recipe.evaluation, recipe.device, job
        given = self._settings.texts or {DEFAULT: DEFAULT}
        self._paths = {name: resolved(path, directory) for name, path in given.items()}
        self.names = {str(path): name for name, path in self._paths.items()}
        hashes = {name: job.sha256(path) if str(path) != DEFAULT else DEFAULT for name, path in self._paths.items()}
        self.inputs: dict[str, Any] = {
            "texts": [*hashes.items()],
            "settings": self._settings.model_dump(exclude={"texts"}),
            "device": self._device,
        }

    def check(self, calibration: Iterable[Path]) -> None:
        """UsageError if one of the texts is among those of the calibration, found before the work."""
        seen = {self._job.sha256(path): path for path in calibration if path.is_file()}
        for name, path in self._paths.items() if not self._settings.allow_calibration_text else ():
            if path.is_file() and (same := seen.get(self._job.sha256(path))) is not None:
                raise UsageError(
                    f"evaluation.texts.{name}: outputs are calibrated on {path} ({same}), where they look better than "
                    "they are",
                    hint="give a text that calibration never sees, or set evaluation.allow_calibration_text",
                )

    def run(self, places: Mapping[str, Path], source: str, progress: Progress) -> EvaluationRun:
        """Measure the outputs at these places."""
        settings = self._settings
        names = {"base": "the source", **dict(zip(stage_names(len(places)), places, strict=True))}
        stages: set[str] = set()

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages.add(stage)
                progress.stage(f"measuring {names.get(stage, stage)}")
            progress.block(done, total)

        run = evaluate_models(
            list(places.values()),
            against=source,
            texts=list(self._paths.values()),
            windows=settings.windows,
            window_len=settings.window_len,
            seed=settings.seed,
            device=self._device,
            on_progress=tell,
            with_floor=settings.noise_floor,
            allow_calibration_text=settings.allow_calibration_text,
        )
        for place, evaluation in zip(places.values(), run.evaluations, strict=True):
            record_evaluation(place, evaluation.to_dict())
        return run
