"""The adapter through which lm-evaluation-harness (the extra `aphroquant[tasks]`) sees a checkpoint.

Likelihoods come from the streamed float32 forward that the rest of the evaluation uses, generated text from the engine.
As in the harness's own adapter for transformers, prompts get no BOS, an empty context is the BOS token (or the end of
text, where there is none), and a context too long loses its beginning.
"""

from __future__ import annotations

import difflib
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.devices import torch_device
from aphroquant.engine.types import MAX_STOP_STRINGS, SamplingParams
from aphroquant.errors import InputError, UsageError
from aphroquant.evaluation.scoring import ContinuationScorer, Request
from aphroquant.evaluation.tasks import TaskResults, TaskScore, TaskSettings

if TYPE_CHECKING:
    from aphroquant.engine.llm import LLM

_GENERATED = 256  # tokens of an answer where the task does not say
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class CheckpointLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint as the harness wants a model. Likelihoods need no engine, generation loads one."""

    def __init__(self, checkpoint: Checkpoint, *, device: str = "auto") -> None:
        super().__init__()
        self._checkpoint, self._device_name = checkpoint, device
        self.tokenizer = checkpoint.tokenizer()
        self._scorer = ContinuationScorer(checkpoint, device=torch_device(device))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self._scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        return self._checkpoint.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        wanted = [Request(context, continuation) for _, context, continuation in requests]
        return [(score.logprob, score.is_greedy) for score in self._scorer.score(wanted)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text's log-probability, in windows of the whole context that predict every token once."""
        windows = [self._rolling_windows(request.args[0]) for request in requests]
        scores = iter(self._scorer.score([window for of_one in windows for window in of_one]))
        return [sum(next(scores).logprob for _ in of_one) for of_one in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers by the engine, cut before the first of the task's stop strings."""
        alike: dict[str, list[int]] = {}  # numbers of requests that generate by the same rules, and so together
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        found: dict[int, str] = {}
        for numbers in alike.values():
            contexts = [requests[number].args[0] for number in numbers]
            found.update(zip(numbers, self._generate(contexts, requests[numbers[0]].args[1]), strict=True))
        return [found[number] for number in range(len(requests))]

    def _generate(self, contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        stops = _stop_strings(options.get("until"))
        asked = next((options[name] for name in _LIMITS if name in options), _GENERATED)
        max_tokens = min(int(asked), self.max_length - 1)
        room = self.max_length - max_tokens
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0,
            stop=tuple(stops[:MAX_STOP_STRINGS]),
            seed=0,
        )
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        return [_cut(answer.text, stops) for answer in self._engine.generate(prompts, sampling)]

    def _rolling_windows(self, text: str) -> list[Request]:
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [Request(*make_disjoint_window(window)) for window in rolling]

    @cached_property
    def _engine(self) -> LLM:
        from aphroquant.engine.llm import LLM

        return LLM(self._checkpoint.source, device=self._device_name, activations="float")


def run_tasks(
    models: Sequence[str | Path],
    *,
    against: str | Path,
    settings: TaskSettings,
    device: str = "auto",
) -> tuple[TaskResults, ...]:
    """The scores of each model beside its base's. Models are measured one after the other, the base only once."""
    manager = task_index(settings)
    base, _ = _scores(against, manager, settings, device)
    found = []
    for model in models:
        started = time.monotonic()
        scores, samples = _scores(model, manager, settings, device)
        paired = (_paired(key, scores[key], base[key], samples.get(key[0], 0), settings) for key in sorted(scores))
        found.append(
            TaskResults(
                harness=f"lm-evaluation-harness {version('lm_eval')}",
                limit=settings.limit,
                seconds=time.monotonic() - started,
                scores=tuple(paired),
            )
        )
    return tuple(found)


class _Metric(NamedTuple):
    """A value, its standard error if the harness has one, and whether more is better."""

    value: float
    stderr: float | None
    higher_is_better: bool | None


MetricKey = tuple[str, str]  # task, metric


@lru_cache(maxsize=1)  # read before an evaluation, to find a wrong name, and again after it
def task_index(settings: TaskSettings) -> TaskManager:
    """An index in which all names are. That of the harness has thousands, and is read only if it is needed."""
    path = None if settings.path is None else str(settings.path)
    if path is not None:
        own = TaskManager(include_path=path, include_defaults=False)
        if set(settings.names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=path)
    _check_names(settings.names, manager.all_tasks)
    return manager


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """UsageError naming a task that does not exist, and the one most like it."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"there is no task {name!r} in lm-evaluation-harness",
                hint=f"did you mean {near[0]!r}?" if near else "give its directory with --task-path",
            )


def _scores(
    model: str | Path, manager: TaskManager, settings: TaskSettings, device: str
) -> tuple[dict[MetricKey, _Metric], dict[str, int]]:
    """All metrics of one model, and how many samples each task had."""
    gc.collect()  # the engine of the model before is in cycles, and a GPU's memory is needed
    adapter = CheckpointLM(open_checkpoint(model), device=device)
    try:
        results = simple_evaluate(
            model=adapter,
            tasks=list(settings.names),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except (OSError, KeyError, ValueError, ImportError) as error:
        raise InputError(
            f"a task of {', '.join(settings.names)} cannot be run: {error}",
            hint="its data has to be reachable, or in the cache of the datasets library",
        ) from error
    counts = {name: int(count["effective"]) for name, count in results.get("n-samples", {}).items()}
    better = results.get("higher_is_better", {})
    return dict(_metrics(results["results"], better)), counts


def _metrics(
    results: Mapping[str, Mapping[str, Any]], better: Mapping[str, Mapping[str, bool | None]]
) -> Iterator[tuple[MetricKey, _Metric]]:
    """Out of entries as "acc,none": 0.5 and "acc_stderr,none": 0.01."""
    for task, entries in results.items():
        for key, value in entries.items():
            name, _, filtered = key.partition(",")
            number = _number(value)
            if not filtered or name.endswith("_stderr") or number is None:
                continue
            stderr = _number(entries.get(f"{name}_stderr,{filtered}"))
            metric = name if filtered == "none" else f"{name} ({filtered})"
            yield (task, metric), _Metric(number, stderr, better.get(task, {}).get(name))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _paired(key: MetricKey, found: _Metric, base: _Metric, samples: int, settings: TaskSettings) -> TaskScore:
    return TaskScore(
        task=key[0],
        metric=key[1],
        value=found.value,
        stderr=found.stderr,
        base_value=base.value,
        base_stderr=base.stderr,
        num_samples=samples,
        num_fewshot=settings.num_fewshot,
        higher_is_better=found.higher_is_better,
    )


def _stop_strings(until: Any) -> list[str]:
    """The strings that end an answer; empty ones would end it at once, and mean nothing."""
    asked = [until] if isinstance(until, str) else list(until or [])
    return [str(stop) for stop in asked if stop]


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
