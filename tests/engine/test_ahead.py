"""Steps that begin before the tokens of the one in front are known give the same answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from aphroquant.engine.ahead import KnownTokens
from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.sampling import RequestSampler, Sampled


class LatePending:
    """Tokens that the host learns only when it asks; until then they lie in `on_device`."""

    def __init__(self, logits: Tensor, samplers: Sequence[RequestSampler]) -> None:
        self._known = KnownTokens(logits, samplers).result()
        self.is_read = False
        tokens = [0 if sampled is None else sampled.token for sampled in self._known]
        self.on_device: Tensor | None = torch.tensor(tokens, dtype=torch.int32)
        if any(sampler.num_logprobs is not None for sampler in samplers):
            self.on_device = None

    def result(self) -> list[Sampled | None]:
        self.is_read = True
        return self._known


class Ahead:
    """A runner that can go ahead, around one that cannot. Counts how often it did."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.num_ahead, self.fails_ahead = runner, 0, False
        self.pending: list[LatePending] = []

    def forward(self, batch: ForwardBatch) -> Tensor:
        logits: Tensor = self.runner.forward(batch)
        return logits

    def forward_ahead(self, batch: ForwardBatch, tokens: Tensor, rows: list[int]) -> Tensor:
        assert not self.pending[-1].is_read
        if self.fails_ahead:
            raise RuntimeError("broken kernel")
        self.num_ahead += 1
        batch.token_ids = tokens[torch.tensor(rows)]
        return self.forward(batch)

    def begin_sampling(self, logits: Tensor, samplers: Sequence[RequestSampler]) -> LatePending:
        self.pending.append(LatePending(logits, samplers))
        return self.pending[-1]


def ahead_engine(harness: Any, **settings: Any) -> Any:
    runner = Ahead(harness.PretendedRunner(settings.get("num_kv_blocks", 64), settings.get("block_size", 4)))
    return harness.pretended(runner=runner, **settings)


def test_decoding_goes_ahead_and_the_surplus_is_dropped(harness: Any) -> None:
    engine = ahead_engine(harness)
    lengths = [3, 8, 8, 20]
    requests = [harness.request([index, 1], str(index), max_tokens=n) for index, n in enumerate(lengths)]
    outcomes = harness.run(engine, *requests)
    for index, length in enumerate(lengths):
        assert outcomes[str(index), 0].tokens == harness.continuation([index, 1], length)
    runner = engine._model.runner
    assert runner.num_ahead == 19  # every step but the first
    assert runner.runner.num_tokens == 4 * 2 + sum(lengths) - 4  # ends by length are foreseen
    assert engine.stats().kv_blocks_used == 0


def test_an_ending_token_is_seen_one_step_late_and_changes_nothing(harness: Any) -> None:
    answer = harness.continuation([1, 2], 8)
    engine = ahead_engine(harness, ending_tokens=(answer[3],))
    outcomes = harness.run(engine, harness.request([1, 2], "a"), harness.request([9], "b", max_tokens=30))
    assert outcomes["a", 0].tokens == answer[:4]
    assert outcomes["a", 0].finish_reason == "stop"
    assert outcomes["b", 0].tokens[:4] == harness.continuation([9], 30)[:4]
    engine.check()
    again = harness.run_one(engine, harness.request([1, 2], "again", ignore_eos=True))
    assert again.tokens == answer


@pytest.mark.parametrize("num_kv_blocks", [12, 20, 200])
@pytest.mark.parametrize("budget", [3, 24])
def test_memory_and_chunks_do_not_matter(harness: Any, num_kv_blocks: int, budget: int) -> None:
    engine = ahead_engine(harness, num_kv_blocks=num_kv_blocks, max_num_batched_tokens=budget, max_model_len=32)
    generator = random.Random(num_kv_blocks)
    many = [[generator.randrange(256) for _ in range(generator.randrange(1, 20))] for _ in range(30)]
    outcomes = harness.run(engine, *[harness.request(p, str(i), max_tokens=12) for i, p in enumerate(many)])
    for index, prompt in enumerate(many):
        assert outcomes[str(index), 0].tokens == harness.continuation(prompt, 12)
    assert engine._model.runner.num_ahead > 10
    assert engine.stats().kv_blocks_used == 0


def test_a_long_random_life_ahead_keeps_every_book(harness: Any) -> None:
    generator = random.Random(5)
    engine = ahead_engine(harness, num_kv_blocks=24, max_num_seqs=5, max_num_batched_tokens=20, max_model_len=60)
    expected: dict[str, list[int]] = {}
    found: dict[str, list[int]] = {}
    aborted: set[str] = set()
    for step in range(1500):
        if generator.random() < 0.1 and len(expected) - len(found) < 10:
            prompt = [generator.randrange(256)] * generator.randrange(1, 25)
            expected[str(step)] = harness.continuation(prompt, 25)
            stop = (expected[str(step)][generator.randrange(25)],) if generator.random() < 0.5 else ()
            request = harness.request(prompt, str(step), max_tokens=25, ignore_eos=True, stop_token_ids=stop)
            engine.add_request(request)
        if generator.random() < 0.03 and expected:
            aborted.add(victim := generator.choice(list(expected)))
            engine.abort(victim)
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
        engine.check()
    while engine.has_unfinished():
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert engine.step() == []
    assert engine.stats().kv_blocks_used == 0
    assert engine._model.runner.num_ahead > 200
    for request, tokens in found.items():
        assert tokens == expected[request][: len(tokens)]
        assert tokens or request in aborted


def test_seeds_draw_the_same_tokens_ahead(harness: Any) -> None:
    def requests() -> list[Any]:
        return [
            harness.request([index], str(index), temperature=5.0, seed=index, max_tokens=10 + index)
            for index in range(5)
        ]

    plain, ahead = (harness.run(engine, *requests()) for engine in (harness.pretended(), ahead_engine(harness)))
    assert {key: outcome.tokens for key, outcome in plain.items()} == {
        key: outcome.tokens for key, outcome in ahead.items()
    }


def test_samplers_of_the_host_keep_the_engine_from_going_ahead(harness: Any) -> None:
    engine = ahead_engine(harness)
    harness.run(engine, harness.request([1], "a", logprobs=1), harness.request([2], "b"))
    assert engine._model.runner.num_ahead == 0


def test_a_failure_ahead_is_tried_again_in_its_turn(harness: Any) -> None:
    engine = ahead_engine(harness)
    engine._model.runner.fails_ahead = True
    assert harness.run_one(engine, harness.request([3, 4])).tokens == harness.continuation([3, 4], 8)


def test_rows_that_are_no_numbers_end_alone_ahead(harness: Any) -> None:
    class Broken:
        def __init__(self, runner: Any) -> None:
            self.runner = runner

        def forward(self, batch: ForwardBatch) -> Tensor:
            logits: Tensor = self.runner.forward(batch)
            logits[(batch.context_lens == 6)[: len(logits)]] = torch.nan
            return logits

    engine = harness.pretended(runner=Ahead(Broken(harness.PretendedRunner(64, 4))))
    outcomes = harness.run(engine, harness.request([1, 2, 3], "bad"), harness.request([1] * 9, "good"))
    assert outcomes["bad", 0].finish_reason == "error"
    assert outcomes["good", 0].tokens == harness.continuation([1] * 9, 8)
