"""How fast an engine is: tokens a second while it reads prompts and while it answers, everything included."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aphroquant.engine.engine import Engine
from aphroquant.engine.types import GenerationRequest, SamplingParams
from aphroquant.errors import InputError, ResourceError, UsageError

_WARM_STEPS = 4


@dataclass(frozen=True)
class EngineSpeed:
    """`batch` requests at a time whose prompts have `context` tokens each, over `steps` decode steps."""

    batch: int
    context: int
    steps: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    step_milliseconds: float  # median

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}


def measure_engine(engine: Engine, *, vocab_size: int, batch: int, context: int, steps: int) -> EngineSpeed:
    """Greedy answers to random prompts, all running at the same time."""
    budget = engine.config.max_num_batched_tokens or context  # those that begin early answer while the others read
    longest = steps + _WARM_STEPS + 2 * (-(-batch * context // budget) + batch)
    _check_room(engine, batch, context + longest)
    generator = np.random.default_rng(batch)
    sampling = SamplingParams(temperature=0, max_tokens=longest, ignore_eos=True)
    for index in range(batch):
        prompt = generator.integers(0, vocab_size, context).tolist()
        engine.add_request(GenerationRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
    started = time.perf_counter()
    begun: set[str] = set()
    while len(begun) < batch:
        begun |= {delta.request_id for delta in engine.step()}
    prefill_seconds = time.perf_counter() - started
    for _ in range(_WARM_STEPS):
        engine.step()
    times = [_timed_step(engine, batch) for _ in range(steps)]
    for index in range(batch):
        engine.abort(str(index))
    while engine.has_unfinished():
        engine.step()
    return EngineSpeed(
        batch=batch,
        context=context,
        steps=steps,
        prefill_tokens_per_second=batch * context / prefill_seconds,
        decode_tokens_per_second=batch * steps / sum(times),
        step_milliseconds=1e3 * statistics.median(times),
    )


def _timed_step(engine: Engine, batch: int) -> float:
    """Seconds. A step ends when its tokens are known on the host."""
    started = time.perf_counter()
    deltas = engine.step()
    seconds = time.perf_counter() - started
    failed = next((delta.error for delta in deltas if delta.error), None)
    if failed or len(deltas) != batch:
        raise InputError(f"a step of {batch} answers gave {len(deltas)} tokens: {failed or 'some have ended'}")
    return seconds


def _check_room(engine: Engine, batch: int, length: int) -> None:
    if batch > engine.config.max_num_seqs:
        raise UsageError(f"batch = {batch} must be at most max_num_seqs = {engine.config.max_num_seqs}")
    if length > engine.max_model_len or batch * (length + engine.config.block_size) > engine.kv_capacity_tokens:
        raise ResourceError(
            f"{batch} answers of up to {length} tokens do not fit into a KV cache of {engine.kv_capacity_tokens}",
            hint="lower --context or --batch",
        )
