"""Generation drift: how long a candidate's greedy answers stay those of its base.

Teacher forcing shows one step at a time; in generation a single different token changes everything after it. Base and
candidate continue the same prompts greedily in the engine, and what is reported is where they first part: after a few
tokens of text, after much text, and in questions that take reasoning. Arithmetic is that of serving, but inputs of
linears stay floats unless the checkpoint itself quantizes them.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aphroquant.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from aphroquant.checkpoint import Checkpoint
    from aphroquant.evaluation.texts import EvaluationText

DEFAULT_TOKENS = 128
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)  # after which the share of identical answers is told
_SHORT, _LONG = (8, 32), (4, 1024)  # prompts, tokens of each
_BLOCK = 16
_QUESTIONS = (
    "A train leaves at 9:40 and arrives at 13:05. It stands still for 25 minutes on the way. How long does it move?",
    "Anna has 3 boxes of 12 pencils each. She gives 7 pencils to Ben and half of the rest to Carl. How many are left?",
    "If all glims are trops and no trop is a vark, can a glim be a vark? Explain each step.",
    "A rectangle is twice as long as it is wide, and its outline measures 54 cm. What is its area?",
    "Write a function that returns the second largest of a list of numbers, and explain how it works line by line.",
    "Today is Wednesday. Which day of the week will it be 100 days from now? Show how you find it.",
)
OnAnswers = Callable[[str, int, int], None]  # which model, answers finished, answers in all


@dataclass(frozen=True, kw_only=True)
class DriftFigures:
    """One kind of prompts. Positions count generated tokens from 0.

    Quartiles of the first differing position are None where so many answers never differed that they are not reached.
    `identical_after` maps numbers of tokens to the share of answers that were the same up to there.
    """

    kind: str
    prompts: int
    prompt_tokens: float  # mean
    generated_tokens: float  # mean, of the base
    first_quartile: float | None
    median: float | None
    third_quartile: float | None
    never: float  # share of answers that are the same to the end
    identical_after: dict[str, float]

    @property
    def quartiles(self) -> tuple[float | None, float | None, float | None]:
        return self.first_quartile, self.median, self.third_quartile


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Figures by kind of prompt; up to `max_tokens` tokens were generated."""

    max_tokens: int
    seconds: float
    kinds: tuple[DriftFigures, ...]


class PromptSet(NamedTuple):
    """Prompts of one kind, as tokens."""

    kind: str
    prompts: list[list[int]]


def measure_drift(
    models: Sequence[str | Path],
    *,
    against: str | Path,
    texts: Sequence[str | Path] | str | Path | None = None,
    max_tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    on_progress: OnAnswers | None = None,
) -> tuple[Drift, ...]:
    """The drift of each model from its base, which answers only once. Models are loaded one after the other."""
    from aphroquant.checkpoint import open_checkpoint
    from aphroquant.evaluation.texts import read_texts

    progress = on_progress or (lambda stage, done, total: None)
    base = open_checkpoint(against)
    check_drift(base, max_tokens)
    sets = prompt_sets(base, read_texts(texts), max_tokens)
    expected, _ = _answers(str(against), sets, max_tokens, device, partial(progress, "base"))
    found = []
    for number, model in enumerate(models, 1):
        stage = "model" if len(models) == 1 else f"model {number}"
        answers, seconds = _answers(str(model), sets, max_tokens, device, partial(progress, stage))
        kinds = [figures(one.kind, one.prompts, expected[i], answers[i], max_tokens) for i, one in enumerate(sets)]
        found.append(Drift(max_tokens=max_tokens, seconds=seconds, kinds=tuple(kinds)))
    return tuple(found)


def check_drift(base: Checkpoint, max_tokens: int) -> None:
    """UsageError if answers cannot be that long."""
    context = base.spec.max_position_embeddings
    if max_tokens < 1:
        raise UsageError(f"drift tokens = {max_tokens} must be at least 1")
    if max_tokens >= context:
        raise UsageError(
            f"drift tokens = {max_tokens} must be less than {context}, the context length of {base.source}"
        )


def prompt_sets(base: Checkpoint, texts: Sequence[EvaluationText], max_tokens: int) -> list[PromptSet]:
    """Short and long beginnings out of the texts, and questions; as much as the context holds beside the answer."""
    from aphroquant.evaluation.windows import encode

    room = base.spec.max_position_embeddings - max_tokens
    tokenizer = base.tokenizer()
    stream = [token for text in texts for token in encode(tokenizer, text.content)]
    sets = [
        PromptSet("short text", _beginnings(stream, *_SHORT, room)),
        PromptSet("long text", _beginnings(stream, *_LONG, room)),
        PromptSet("reasoning", [prompt for prompt in _questions(tokenizer) if len(prompt) <= room]),
    ]
    return [one for one in sets if one.prompts]


def figures(
    kind: str, prompts: Sequence[Sequence[int]], expected: Sequence[list[int]], found: Sequence[list[int]], limit: int
) -> DriftFigures:
    """Where answers part from those expected."""
    places = sorted(first_difference(ours, theirs) for ours, theirs in zip(expected, found, strict=True))
    quartiles = [_quantile(places, share) for share in (0.25, 0.5, 0.75)]
    return DriftFigures(
        kind=kind,
        prompts=len(prompts),
        prompt_tokens=_mean([len(prompt) for prompt in prompts]),
        generated_tokens=_mean([len(answer) for answer in expected]),
        first_quartile=quartiles[0],
        median=quartiles[1],
        third_quartile=quartiles[2],
        never=_mean([place == math.inf for place in places]),
        identical_after={
            str(length): _mean([place >= length for place in places]) for length in LENGTHS if length <= limit
        },
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The first place where two answers differ, an end counting as a token; infinite if they do not."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return place
    return math.inf if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _quantile(places: Sequence[float], share: float) -> float | None:
    """Of ascending places, by linear interpolation; None if it is not reached."""
    at = share * (len(places) - 1)
    low, high = places[math.floor(at)], places[math.ceil(at)]
    value = low if low == high else low + (high - low) * (at - math.floor(at))
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _beginnings(stream: Sequence[int], count: int, length: int, room: int) -> list[list[int]]:
    """Evenly spaced pieces of the stream; fewer where it is short."""
    length = min(length, room)
    count = min(count, len(stream) // length)
    starts = (i * (len(stream) - length) // max(1, count - 1) for i in range(count))
    return [list(stream[start : start + length]) for start in starts]


def _questions(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Questions through the chat template, or, of a model without one, as text."""
    from aphroquant.engine.prompts import chat_prompt, text_prompt

    if tokenizer.chat_template:
        return [chat_prompt(tokenizer, [{"role": "user", "content": question}]) for question in _QUESTIONS]
    return [text_prompt(tokenizer, f"Question: {question}\nAnswer, step by step:") for question in _QUESTIONS]


def _answers(
    model: str, sets: Sequence[PromptSet], max_tokens: int, device: str, on_progress: Callable[[int, int], None]
) -> tuple[list[list[list[int]]], float]:
    """The greedy answers of every set, and the seconds that they took with loading. The model is gone afterwards."""
    from aphroquant.engine.llm import LLM
    from aphroquant.engine.types import SamplingParams

    started = time.monotonic()
    prompts = [prompt for one in sets for prompt in one.prompts]
    longest = max(len(prompt) for prompt in prompts) + max_tokens
    blocks = sum(math.ceil((len(prompt) + max_tokens) / _BLOCK) + 1 for prompt in prompts)
    llm = LLM(
        model, device=device, activations="float", max_model_len=longest, block_size=_BLOCK, num_kv_blocks=blocks,
        max_num_seqs=len(prompts), enable_prefix_caching=False,
    )  # fmt: skip
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens), progress=on_progress)
    answers = iter([generation.token_ids for generation in found])
    del llm
    gc.collect()  # a GPU's memory is needed for the next model
    return [[next(answers) for _ in one.prompts] for one in sets], time.monotonic() - started
