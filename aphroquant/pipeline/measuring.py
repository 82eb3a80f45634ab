"""The evaluation of a recipe: the outputs in one run against the source, and the figures put into their records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aphroquant.conversion.progress import Progress
from aphroquant.evaluation.compare import evaluate_models
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
        self._settings, self._device = recipe.evaluation, recipe.device
        given = self._settings.texts or {DEFAULT: DEFAULT}
        self._paths = {name: resolved(path, directory) for name, path in given.items()}
        self.names = {str(path): name for name, path in self._paths.items()}
        hashes = {name: job.sha256(path) if str(path) != DEFAULT else DEFAULT for name, path in self._paths.items()}
        self.inputs: dict[str, Any] = {
            "texts": [*hashes.items()],
            "settings": self._settings.model_dump(exclude={"texts"}),
            "device": self._device,
        }

    def run(self, places: Mapping[str, Path], source: str, progress: Progress) -> EvaluationRun:
        """Measure the outputs at these places."""
        settings = self._settings
        stages: set[str] = set()

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages.add(stage)
                progress.stage(f"measuring: {stage}")
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
        )
        for place, evaluation in zip(places.values(), run.evaluations, strict=True):
            record_evaluation(place, evaluation.to_dict())
        return run
