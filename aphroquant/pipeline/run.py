"""run_pipeline(): the steps of a recipe in order, each done only if what it depends on has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import aphroquant
from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.checkpoint.disk import size_text
from aphroquant.conversion.manifest import request_arguments
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.run import convert_all
from aphroquant.errors import AphroquantError, GateError, InputError
from aphroquant.evaluation.gate import GateCheck
from aphroquant.evaluation.result import Evaluation
from aphroquant.pipeline.gates import checks_of, read_baseline, regressions
from aphroquant.pipeline.job import Job, StepRecord, key_of
from aphroquant.pipeline.measuring import Measuring
from aphroquant.pipeline.memory import forget_peak, peak_since
from aphroquant.pipeline.publish import Target, targets_of
from aphroquant.pipeline.reports import write_reports
from aphroquant.pipeline.result import OutputResult, PipelineResult, StepResult
from aphroquant.pipeline.verifying import verify_output
from aphroquant.planning.plan import plan
from aphroquant.provenance.environment import environment
from aphroquant.provenance.records import CARD, OutputRecord
from aphroquant.recipes.loading import LoadedRecipe, require_source
from aphroquant.recipes.models import gates_of
from aphroquant.recipes.requests import check_files, requests_of, resolved
from aphroquant.reporting.report import renamed

OnStep = Callable[[StepResult], None]
_GGUF = ".gguf"


def run_pipeline(
    loaded: LoadedRecipe,
    job: Path,
    *,
    baseline: Path | None = None,
    max_regression: float = 0.0,
    publishes: bool = True,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    on_start: Callable[[str], None] | None = None,
    on_failure: Callable[[PipelineResult], None] | None = None,
) -> PipelineResult:
    """Carry a recipe out in the directory `job`, and write its reports there.

    Gates that are missed are in the result, and keep it from being published; they raise nothing. Whatever else goes
    wrong is raised, after the reports were written and `on_failure` was called with what there is. `baseline` is an
    earlier report that no figure may be worse than by more than the share `max_regression`.
    """
    require_source(loaded.recipe, loaded.name)
    with Job(job) as opened:
        run = _Run(
            loaded, opened, progress or Progress(), on_step or (lambda step: None), on_start or (lambda name: None)
        )
        try:
            run.all_steps(baseline, max_regression, publishes)
        except AphroquantError as error:
            run.result.error = error.message
            write_reports(run.result, opened.directory, loaded)
            if on_failure is not None:
                on_failure(run.result)
            raise
        return run.result


class _Run:
    """One run. The steps are methods, in the order in which they are done."""

    def __init__(
        self,
        loaded: LoadedRecipe,
        job: Job,
        progress: Progress,
        on_step: OnStep,
        on_start: Callable[[str], None],
    ) -> None:
        self.loaded, self.recipe, self.job = loaded, loaded.recipe, job
        self._progress, self._on_step, self._on_start = progress, on_step, on_start
        assert self.recipe.source is not None
        name = self.recipe.name or loaded.name
        self.result = PipelineResult(name, self.recipe.source, self.recipe.model_dump(mode="json", by_alias=True))
        self._requests: dict[str, ConversionRequest] = {}
        self._keys: dict[str, str] = {}  # of what each output is made from
        self._made: dict[str, Mapping[str, str]] = {}  # files of each output, by path, that no later step changes

    def all_steps(self, baseline: Path | None, max_regression: float, publishes: bool) -> None:
        with self._step("plan") as told:
            earlier = None if baseline is None else read_baseline(baseline)
            targets = targets_of(self.recipe, self.loaded.directory) if publishes else []
            checkpoint = self._plan(told)
        self._convert(checkpoint)
        self._verify()
        if self.recipe.evaluation is not None:
            self._evaluate(checkpoint)
            self._gate(earlier, max_regression)
        self._publish(targets)
        with self._step("report") as told:
            told(str(self.job.directory / "report"))
            write_reports(self.result, self.job.directory, self.loaded)

    def _plan(self, told: Callable[[str], None]) -> Checkpoint:
        missing: list[str] = []
        check_files(self.recipe, self.loaded.directory, missing.append)
        if missing:
            raise InputError(f"{self.loaded.name}: {missing[0]}")
        places = {name: self._place(name) for name in self.recipe.outputs}
        requests = requests_of(self.recipe, places, self.loaded.directory)
        self._requests = {name: self._owned(request) for name, request in requests.items()}
        first = next(iter(self._requests.values()))
        checkpoint = open_checkpoint(first.source)
        self.result.environment = environment(first.device)
        planned = plan(list(self._requests.values()), tries=False).outputs
        if self.recipe.evaluation is not None and any(output.calibrates for output in planned):
            Measuring(self.recipe, self.loaded.directory, self.job).check(first.calibration)
        source = {name: self.job.sha256(path) for name, path in checkpoint.files().items()}
        for (name, request), output in zip(self._requests.items(), planned, strict=True):
            self._keys[name] = key_of(_versions(), _conversion_inputs(request, self.job), source)
            self.result.outputs[name] = OutputResult(name, Path(output.place), request.to, asdict(output))
        sizes = ", ".join(f"{name} {size_text(each.num_bytes)}" for name, each in zip(places, planned, strict=True))
        told(f"{size_text(checkpoint.num_bytes)} to {sizes}")
        return checkpoint

    def _convert(self, checkpoint: Checkpoint) -> None:
        stale = []
        for name in self._requests:
            record = self.job.done(f"convert {name}", self._keys[name])
            if record is None or not _is_recorded(self.result.outputs[name].place, record.files):
                stale.append(name)
                continue
            self._made[name] = record.files
            self.result.outputs[name].conversion = dict(record.found)
            self._tell(StepResult("convert", "cached", record.seconds, _size(record.found), name))
        if not stale:
            return
        for name in stale:
            self.job.begin(f"convert {name}", self._requests[name].out)
        with self._step("convert") as told:
            begun = time.monotonic()
            requests = [self._requests[name] for name in stale]
            results = convert_all(requests, progress=self._progress, names=stale)
            seconds = time.monotonic() - begun
            for name, result in zip(stale, results, strict=True):
                output = self.result.outputs[name]
                output.conversion, output.place = _brief(result.to_dict()), Path(result.out)
                self._made[name] = self.job.records_of(_written_files(output.place))
                record = StepRecord(self._keys[name], seconds, self._made[name], output.conversion)
                self.job.record(f"convert {name}", record)
            told("; ".join(f"{name} {_size(self.result.outputs[name].conversion)}" for name in stale))

    def _verify(self) -> None:
        for name, output in self.result.outputs.items():
            step, key = f"verify {name}", key_of(_versions(), self._made[name])
            record = self.job.done(step, key)
            if record is not None:
                told = str(record.found.get("told", ""))
                self._tell(StepResult("verify", "cached", record.seconds, told, name))
                continue
            with self._step("verify", name) as tell:
                begun = time.monotonic()
                told = verify_output(output.place)
                tell(told)
            self.job.record(step, StepRecord(key, time.monotonic() - begun, {}, {"told": told}))

    def _evaluate(self, checkpoint: Checkpoint) -> None:
        assert self.recipe.evaluation is not None
        measuring = Measuring(self.recipe, self.loaded.directory, self.job)
        source = [self.job.sha256(path) for path in checkpoint.files().values()]
        keys = {name: key_of(_versions(), self._made[name], source, measuring.inputs) for name in self.result.outputs}
        stale = []
        for name, output in self.result.outputs.items():
            record = self.job.done(f"evaluate {name}", keys[name])
            if record is None:
                stale.append(name)
                continue
            output.evaluation = dict(record.found)
            self._tell(StepResult("evaluate", "cached", record.seconds, _figures(output.evaluation), name))
        if stale:
            with self._step("evaluate") as told:
                begun = time.monotonic()
                places = {name: self.result.outputs[name].place for name in stale}
                run = measuring.run(places, self._requests[stale[0]].source, self._progress)
                seconds = time.monotonic() - begun
                for name, evaluation in zip(stale, run.evaluations, strict=True):
                    found = evaluation.to_dict()
                    self.result.outputs[name].evaluation = found
                    self.job.record(f"evaluate {name}", StepRecord(keys[name], seconds, {}, found))
                told("; ".join(f"{name} {_figures(self.result.outputs[name].evaluation)}" for name in stale))
            names = {str(place): name for name, place in places.items()}
            compared = [renamed(comparison, names).to_dict() for comparison in run.comparisons]
            self.job.record("compare", StepRecord(key_of(keys), 0.0, {}, {"comparisons": compared}))
        record = self.job.done("compare", key_of(keys))  # none, if only some were measured in this run
        self.result.comparisons = list(record.found["comparisons"]) if record is not None else []

    def _gate(self, earlier: Mapping[str | None, Evaluation] | None, max_regression: float) -> None:
        texts = Measuring(self.recipe, self.loaded.directory, self.job).names
        begun = time.monotonic()
        for name, output in self.result.outputs.items():
            assert output.evaluation is not None
            evaluation = Evaluation.from_dict(output.evaluation)
            output.checks = checks_of(evaluation, gates_of(self.recipe, name), texts)
            before = None if earlier is None else earlier.get(name, earlier.get(None))
            if before is not None:
                output.checks += regressions(evaluation, before, max_regression)
            elif earlier is not None:
                self.result.notes.append(f"{name} is new: the baseline has no output of that name")
            missed = [check for check in output.checks if not check.passed]
            words = _missed(missed) if missed else _kept(output.checks)
            self._tell(StepResult("gate", "failed" if missed else "done", time.monotonic() - begun, words, name))

    def _publish(self, targets: Sequence[Target]) -> None:
        for target in targets:
            if self.result.failed_checks:
                self._tell(StepResult("publish", "skipped", 0.0, f"{target.place}: a gate was missed"))
                continue
            outputs = {name: self.result.outputs[name].place for name in target.outputs}
            files = {name: self.job.records_of(_all_files(place)) for name, place in outputs.items()}
            step, key = f"publish {target.place}", key_of(target.inputs, files)
            record = self.job.done(step, key)
            if record is not None and target.is_there(record.found):
                self._tell(StepResult("publish", "cached", record.seconds, target.place))
            else:
                with self._step("publish") as told:
                    begun = time.monotonic()
                    found = target.publish(outputs)
                    told(str(found.get("url", target.place)))
                self.job.record(step, StepRecord(key, time.monotonic() - begun, {}, found))
            self.result.published.append(target.place)

    @contextmanager
    def _step(self, name: str, output: str | None = None) -> Iterator[Callable[[str], None]]:
        """Times a step and tells of it, however it ends. What it is called with is the sentence to tell."""
        self._on_start(name if output is None else f"{name} {output}")
        begun, words, measures = time.monotonic(), [""], forget_peak()
        try:
            yield lambda text: words.__setitem__(0, text)
        except AphroquantError as error:
            self._tell(StepResult(name, "failed", time.monotonic() - begun, error.message, output))
            raise
        peak = peak_since() if measures else None
        self._tell(StepResult(name, "done", time.monotonic() - begun, words[0], output, peak))

    def _tell(self, step: StepResult) -> None:
        self.result.steps.append(step)
        self._on_step(step)

    def _place(self, name: str) -> Path:
        output = self.recipe.outputs[name]
        if output.out is not None:
            return resolved(output.out, self.loaded.directory)
        return self._folder / (f"{name}{_GGUF}" if output.to == "gguf" else name)

    @property
    def _folder(self) -> Path:
        """Where outputs are that the recipe names no place for."""
        return self.job.directory / "outputs"

    def _owned(self, request: ConversionRequest) -> ConversionRequest:
        """What this job has made itself is replaced without being asked, and all that is in its own folder."""
        inside = request.out.resolve().is_relative_to(self._folder.resolve())
        return replace(request, overwrite=request.overwrite or inside or self.job.made(request.out))


def _conversion_inputs(request: ConversionRequest, job: Job) -> dict[str, Any]:
    """All that decides an output's bytes, but for the source: settings, and texts by content."""
    arguments = {key: value for key, value in request_arguments(request).items() if key != "source"}
    texts = [*request.calibration, *([request.chat_template] if request.chat_template else [])]
    hashes = [job.sha256(path) if path.is_file() else str(path) for path in texts]
    return {**arguments, "calibration": hashes, "chat_template": None, "out": str(request.out.resolve())}


def _versions() -> dict[str, str | None]:
    from aphroquant.provenance.environment import versions

    return {"aphroquant": aphroquant.__version__, **versions()}


def _written_files(place: Path) -> list[Path]:
    """Those that no later step changes: figures are written into the manifest, the card and the check sums."""
    record = OutputRecord(place)
    return [record.directory / name for name in record.hashes]


def _is_recorded(place: Path, files: Collection[str]) -> bool:
    """Whether an output's manifest is there and whole enough to name these files."""
    try:
        return {str(path.resolve()) for path in _written_files(place)} == set(files)
    except InputError:
        return False


def _all_files(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(path for path in place.rglob("*") if path.is_file())
    record = OutputRecord(place)
    beside = (record.manifest_path, record.sums_path, record.directory / CARD)
    return [place, *(path for path in beside if path.is_file())]


def _brief(conversion: dict[str, Any]) -> dict[str, Any]:
    """Without what is as long as the model."""
    return {key: value for key, value in conversion.items() if key not in ("modules", "scaling", "refinement")}


def _size(conversion: Mapping[str, Any]) -> str:
    return f"{size_text(conversion['num_bytes'])}, {conversion['bits_per_weight']:.2f} bits a weight"


def _figures(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return ""
    kld, top1 = evaluation["mean_kld"], evaluation["top1_agreement"]
    return f"mean KLD {'not finite' if kld is None else f'{kld:.4f}'}, top-1 {top1:.1%}"


def _missed(checks: Sequence[GateCheck]) -> str:
    return ", ".join(check.sentence for check in checks)


def _kept(checks: Sequence[GateCheck]) -> str:
    """The first check is always there: that all logits are finite."""
    count = len(checks) - 1
    return f"all logits finite; {count or 'no'} bound{'' if count == 1 else 's'} {'kept' if count else 'given'}"


def require_gates(result: PipelineResult) -> None:
    """GateError naming the bounds that outputs missed, if any did."""
    if result.failed_checks:
        missed = "; ".join(f"{name}: {_missed([check])}" for name, check in result.failed_checks)
        raise GateError(f"the quality gate failed: {missed}", hint="nothing was published; the report says more")
