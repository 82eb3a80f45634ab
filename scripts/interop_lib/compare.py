"""Runs a case in both directions: the library's answer beside ours, weight by weight and logit by logit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from aphroquant.errors import AphroquantError
from interop_lib.cases import Case, Convert, Given, Rewrite, Write
from interop_lib.environments import interpreter
from interop_lib.ours import (
    ROOT,
    Computed,
    FailedError,
    compute,
    convert,
    dense_source,
    last_lines,
    sample_tokens,
)
from interop_lib.written import write

WORKERS = ROOT / "tests" / "interop" / "workers"
ALONE = ("vllm_worker",)  # an engine a process


@dataclass(frozen=True)
class Outcome:
    """One direction. `equal` of `layers` weights are bit for bit the same (None: the library shows no weights);
    `logits` is the largest difference, as a share of the largest logit (None: there are none to compare)."""

    error: str | None = None
    equal: int | None = None
    layers: int = 0
    logits: float | None = None

    def is_same(self, tolerance: float) -> bool:
        if self.error is not None or not self.layers:
            return False
        return self.equal in (None, self.layers) and (self.logits is None or self.logits <= tolerance)


@dataclass(frozen=True)
class Row:
    case: Case
    ours: Outcome | None  # our checkpoint in the library
    theirs: Outcome | None  # the library's checkpoint here

    @property
    def passed(self) -> bool:
        return all(self._as_expected(way) for way in ("ours", "theirs"))

    def _as_expected(self, way: str) -> bool:
        outcome: Outcome | None = getattr(self, way)
        if outcome is None:
            return True
        if way in self.case.broken:
            return self.case.broken[way][0] in (outcome.error or "it loads")
        return outcome.is_same(self.case.tolerance)

    def to_json(self) -> dict[str, Any]:
        sides = {way: asdict(found) if (found := getattr(self, way)) else None for way in ("ours", "theirs")}
        return {"library": self.case.library, "format": self.case.name, **sides, "passed": self.passed}


def run_cases(cases: list[Case], folder: Path) -> list[Row]:
    """Cases of one worker: what the library saves is read here, then what we write is loaded there."""
    places = {case: folder / _file_name(case) for case in cases}
    for place in places.values():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    theirs = _both(
        [case for case in cases if case.saves],
        lambda chosen: _ask(chosen, "save", places, {case: _source_for(case, places[case]) for case in chosen}),
        lambda case, answer: judge(case, answer, compute(_model_in(places[case] / "theirs"), sample_tokens(384))),
    )
    written = _both([case for case in cases if case.ours is not None], lambda chosen: _write_all(chosen, places), _kept)
    ours = _both(
        [case for case in written if written[case].error is None],
        lambda chosen: _ask(chosen, "load", places, {case: places[case] / "ours" for case in chosen}),
        lambda case, answer: judge(case, answer, compute(_model_in(places[case] / "ours"), sample_tokens(384))),
    )
    return [Row(case, ours.get(case, written.get(case)), theirs.get(case)) for case in cases]


def _both(cases: list[Case], ask: Any, judged: Any) -> dict[Case, Outcome]:
    """An outcome for each case: what was asked, judged, or the error of either."""
    outcomes = {}
    answers = ask(cases) if cases else {}
    for case in cases:
        try:
            if isinstance(answers[case], FailedError):
                raise answers[case]
            outcomes[case] = judged(case, answers[case])
        except (FailedError, AphroquantError) as error:
            outcomes[case] = Outcome(error=str(error))
    return outcomes


def _kept(case: Case, answer: Any) -> Outcome:
    return Outcome()


def _source_for(case: Case, place: Path) -> Path:
    source = dense_source(place.parent, case.source)
    if "ftype" not in case.settings:
        return source
    convert(source, place / "source", ["--to", "gguf", "--scheme", "f32"])  # llama.cpp quantizes GGUF files
    return _model_in(place / "source")


def _write_all(cases: list[Case], places: Mapping[Case, Path]) -> dict[Case, Any]:
    written: dict[Case, Any] = {}
    for case in cases:
        try:
            _write(case, places[case])
            written[case] = None
        except (FailedError, AphroquantError) as error:
            written[case] = FailedError(str(error))
    return written


def _write(case: Case, place: Path) -> None:
    source, out = dense_source(place.parent, case.source), place / "ours"
    if isinstance(case.ours, Convert):
        convert(source, out, case.ours.options.split())
    elif isinstance(case.ours, Rewrite):
        convert(_model_in(place / "theirs"), out, ["--to", case.ours.format])
    elif isinstance(case.ours, Write):
        write(case.ours.name, source, out)
    elif isinstance(case.ours, Given):
        given = case.ours.path.resolve()
        if given.is_file():
            out.mkdir()
            out = out / given.name
        out.symlink_to(given)


def _file_name(case: Case) -> str:
    return re.sub(r"[^\w.]+", "-", f"{case.library}-{case.name}")


def _model_in(folder: Path) -> Path:
    """The checkpoint: the folder, or the one GGUF file in it."""
    return next(folder.glob("*.gguf"), folder)


def _ask(cases: list[Case], task: str, places: Mapping[Case, Path], paths: Mapping[Case, Path]) -> dict[Case, Any]:
    """What the library's worker answers, or the FailedError that it met: all in one process, or one process each."""
    answers: dict[Case, Any] = {}
    for group in [cases] if cases[0].worker not in ALONE else [[case] for case in cases]:
        requests = [_request(case, task, places[case], paths[case]) for case in group]
        log = _run_worker(group[0], requests)
        for case in group:
            (places[case] / f"{task}.log").write_text(log)
            answers[case] = _answer(places[case] / f"{task}.safetensors", log)
    return answers


def _request(case: Case, task: str, place: Path, path: Path) -> Path:
    checkpoint = {"source": str(path), "checkpoint": str(place / "theirs")}
    if task == "load":
        checkpoint = {"checkpoint": str(_model_in(path))}
    content = {
        **checkpoint,
        "task": task,
        "settings": dict(case.settings),
        "token_ids": sample_tokens(384).tolist(),
        "output": str(place / f"{task}.safetensors"),
    }
    (place / f"{task}.json").write_text(json.dumps(content))
    return place / f"{task}.json"


def _run_worker(case: Case, requests: list[Path]) -> str:
    """All that the worker said."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    environ |= {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [interpreter(case.environment), WORKERS / f"{case.worker}.py", *requests]
    place = requests[0].parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environ, check=False)
    return f"{done.stdout}\n{done.stderr}"


def _answer(path: Path, log: str) -> dict[str, torch.Tensor] | FailedError:
    remarks = path.with_suffix(".answer")
    if not remarks.exists():
        return FailedError(last_lines(log))
    error = json.loads(remarks.read_text()).get("error")
    return FailedError(error) if error else load_file(path)


def judge(case: Case, answer: dict[str, torch.Tensor], computed: Computed) -> Outcome:
    """How the library's answer differs from what we compute."""
    weights = dict(answer)
    found, logits = weights.pop("logits", None), None
    if found is not None and computed.logits is not None:
        expected = computed.logits
        if case.log_probabilities:  # of every token after the first
            expected = expected.log_softmax(-1)[:, :-1]
        logits = float((found - expected).abs().max() / computed.logits.abs().max())
    modules = computed.modules()
    if not weights:
        return Outcome(None, None, len(modules), logits)
    equal = sum(_is_equal(weights.get(f"{module}.weight"), computed, module, case.rounding) for module in modules)
    return Outcome(None, equal, len(modules), logits)


def _is_equal(weight: torch.Tensor | None, computed: Computed, module: str, rounding: float) -> bool:
    if weight is None:
        return False
    ours = computed.weight(module, weight.dtype)
    if rounding:
        return bool(((weight - ours).abs() <= rounding * ours.abs()).all())
    return torch.equal(weight, ours)
