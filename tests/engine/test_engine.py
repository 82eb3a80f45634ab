"""Requests through the engine on a pretended model, whose right answers are known: nothing is mixed up or lost."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.types import EngineConfig
from aphroquant.errors import RequestError, UsageError


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts, many of which share a beginning."""
    generator = random.Random(seed)
    stems = [[generator.randrange(256) for _ in range(20)] for _ in range(3)]
    return [
        generator.choice(stems)[: generator.randrange(20)] + [generator.randrange(256)] * generator.randrange(1, 12)
        for _ in range(count)
    ]


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7, 16, 512])
@pytest.mark.parametrize("caching", [True, False])
def test_every_chunk_size_gives_the_same_answer(harness: Any, budget: int, caching: bool) -> None:
    engine = harness.pretended(max_num_batched_tokens=budget, enable_prefix_caching=caching)
    for index, prompt in enumerate(prompts(3)):
        outcome = harness.run_one(engine, harness.request(prompt, f"r{index}"))
        assert outcome.tokens == harness.continuation(prompt, 8)
        assert outcome.finish_reason == "length"


@pytest.mark.parametrize("num_kv_blocks", [8, 12, 20, 200])
def test_many_requests_at_once_answer_as_each_alone_whatever_the_memory(harness: Any, num_kv_blocks: int) -> None:
    engine = harness.pretended(num_kv_blocks=num_kv_blocks, max_num_batched_tokens=24, max_model_len=32)
    many = prompts(40, seed=num_kv_blocks)
    many = [prompt[:20] for prompt in many]
    outcomes = harness.run(engine, *[harness.request(p, str(i), max_tokens=12) for i, p in enumerate(many)])
    for index, prompt in enumerate(many):
        assert outcomes[str(index), 0].tokens == harness.continuation(prompt, 12)
    if num_kv_blocks == 12:
        assert engine.stats().preemptions > 0


def test_a_long_random_life_keeps_every_book(harness: Any) -> None:
    """Arrivals, aborts, several choices, salts, preemption, for many steps: every answer is right or was aborted."""
    generator = random.Random(7)
    engine = harness.pretended(num_kv_blocks=24, max_num_seqs=6, max_num_batched_tokens=20, max_model_len=60)
    expected: dict[str, list[int]] = {}
    found: dict[tuple[str, int], list[int]] = {}
    ended: dict[tuple[str, int], str] = {}
    aborted: set[str] = set()
    pool = prompts(12, seed=3)
    for step in range(3000):
        if generator.random() < 0.15 and len(expected) - len({request for request, _ in ended}) < 20:
            prompt = [*generator.choice(pool)[:30], *[generator.randrange(256)] * generator.randrange(3)]
            max_tokens, n = generator.randrange(1, 25), generator.choice([1, 1, 1, 3])
            salt = generator.choice(["", "a"])
            engine.add_request(harness.request(prompt, str(step), max_tokens=max_tokens, n=n, cache_salt=salt))
            expected[str(step)] = harness.continuation(prompt, max_tokens)
        if generator.random() < 0.02 and expected:
            victim = generator.choice(list(expected))
            aborted.add(victim)
            engine.abort(victim)
        for delta in engine.step():
            key = (delta.request_id, delta.index)
            assert key not in ended
            found.setdefault(key, []).extend(delta.token_ids)
            if delta.finish_reason:
                ended[key] = delta.finish_reason
        engine.check()
    while engine.has_unfinished():
        for delta in engine.step():
            found.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
            if delta.finish_reason:
                ended[delta.request_id, delta.index] = delta.finish_reason
    assert engine.stats().kv_blocks_used == 0
    assert engine.stats().preemptions > 20
    assert engine.stats().prefix_hits > 100
    assert {request for request, _ in ended} == set(expected)
    for key, tokens in found.items():
        whole = expected[key[0]]
        if ended[key] == "length":
            assert tokens == whole
        else:
            assert ended[key] == "abort"
            assert key[0] in aborted
            assert tokens == whole[: len(tokens)]


def test_a_repeated_prompt_comes_from_the_prefix_cache(harness: Any) -> None:
    engine = harness.pretended(max_model_len=100)
    prompt = list(range(50))
    first = harness.run_one(engine, harness.request(prompt, "1"))
    num_tokens = engine._model.runner.num_tokens
    second = harness.run_one(engine, harness.request(prompt, "2"))
    assert first.tokens == second.tokens
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)
    assert engine._model.runner.num_tokens - num_tokens == 2 + 7
    assert (engine.stats().prefix_queries, engine.stats().prefix_hits) == (100, 48)


def test_prefixes_are_not_shared_between_salts(harness: Any) -> None:
    engine = harness.pretended()
    prompt = list(range(30))
    harness.run_one(engine, harness.request(prompt, "1", cache_salt="alice"))
    assert harness.run_one(engine, harness.request(prompt, "2", cache_salt="bob")).num_cached_tokens == 0
    assert harness.run_one(engine, harness.request(prompt, "3", cache_salt="alice")).num_cached_tokens == 28


def test_choices_share_the_blocks_of_their_prompt(harness: Any) -> None:
    engine = harness.pretended(max_num_batched_tokens=16)
    prompt = list(range(41))
    outcomes = harness.run(engine, harness.request(prompt, n=4))
    assert [outcomes["r", index].tokens for index in range(4)] == [harness.continuation(prompt, 8)] * 4
    assert engine._model.runner.num_tokens == 41 + 3 * 1 + 4 * 7


def test_aborting_frees_everything_and_says_so(harness: Any) -> None:
    engine = harness.pretended()
    engine.add_request(harness.request(range(40), "long", n=2, max_tokens=50))
    engine.add_request(harness.request([1], "other"))
    for _ in range(5):
        engine.step()
    engine.abort("long")
    engine.check()
    engine.abort("never heard of")
    outcomes = harness.run(engine)
    assert [outcomes["long", index].finish_reason for index in range(2)] == ["abort", "abort"]
    assert outcomes["other", 0].finish_reason == "length"


def test_a_request_can_be_aborted_before_it_runs(harness: Any) -> None:
    engine = harness.pretended()
    engine.add_request(harness.request([1, 2]))
    engine.abort("r")
    assert engine.has_unfinished()
    (delta,) = engine.step()
    assert (delta.finish_reason, delta.token_ids) == ("abort", [])
    assert not engine.has_unfinished()
    engine.add_request(harness.request([1, 2]))  # the name is free again


def test_an_idle_engine_has_nothing_to_say(harness: Any) -> None:
    engine = harness.pretended()
    assert not engine.has_unfinished()
    assert engine.step() == []


def test_without_max_tokens_the_answer_fills_the_context(harness: Any) -> None:
    engine = harness.pretended(max_model_len=30)
    outcome = harness.run_one(engine, harness.request(range(10), max_tokens=None))
    assert outcome.tokens == harness.continuation(range(10), 20)
    assert outcome.finish_reason == "length"


def test_the_whole_cache_can_be_filled_by_one_request(harness: Any) -> None:
    engine = harness.pretended(num_kv_blocks=5, max_model_len=20)
    assert len(harness.run_one(engine, harness.request([1], max_tokens=19)).tokens) == 19


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([300], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([0] * 30, {"max_tokens": None}, "prompt"),
        ([0] * 40, {"max_tokens": 1}, "prompt"),
        ([0] * 20, {"max_tokens": 11}, "max_tokens"),
        ([0], {"stop_token_ids": (300,)}, "stop_token_ids"),
        ([0], {"temperature": -0.5}, "temperature"),
        ([0], {"temperature": math.nan}, "temperature"),
        ([0], {"top_p": 0.0}, "top_p"),
        ([0], {"n": 0}, "n"),
        ([0], {"n": 10**9}, "n"),
        ([0], {"logprobs": 21}, "logprobs"),
        ([0], {"stop": ("",)}, "stop"),
        ([0], {"min_tokens": 9}, "min_tokens"),
        ([0], {"seed": 2**63}, "seed"),
    ],
)
def test_a_request_that_cannot_run_is_refused_by_name(
    harness: Any, prompt: list[int], params: dict[str, Any], param: str
) -> None:
    engine = harness.pretended(max_model_len=30)
    with pytest.raises(RequestError) as caught:
        engine.add_request(harness.request(prompt, **params))
    assert caught.value.param == param
    assert not engine.has_unfinished()
    assert harness.run_one(engine, harness.request([1, 2])).tokens == harness.continuation([1, 2], 8)


def test_an_over_long_prompt_has_the_code_that_clients_know(harness: Any) -> None:
    with pytest.raises(RequestError, match="31 tokens, but the model's context holds 30") as caught:
        harness.pretended(max_model_len=30).add_request(harness.request([0] * 30, max_tokens=None))
    assert caught.value.code == "context_length_exceeded"


def test_a_request_id_in_use_is_refused(harness: Any) -> None:
    engine = harness.pretended()
    engine.add_request(harness.request([1]))
    with pytest.raises(RequestError, match="already running"):
        engine.add_request(harness.request([2]))


@pytest.mark.parametrize(
    "setting",
    [{"max_num_seqs": 0}, {"max_num_batched_tokens": 0}, {"num_threads": 0}, {"backend": "gpu"}, {"activations": "x"}],
)
def test_a_setting_outside_its_range_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(setting))):
        EngineConfig("model", **setting)


def test_an_ending_token_stops_the_answer_and_has_no_text(harness: Any) -> None:
    answer = harness.continuation([1, 2], 8)
    outcome = harness.run_one(harness.pretended(ending_tokens=(answer[3],)), harness.request([1, 2]))
    assert outcome.tokens == answer[:4]
    assert outcome.finish_reason == "stop"
    assert outcome.text == bytes(t for t in answer[:3] if t < 256).decode(errors="replace")


def test_ignore_eos_and_stop_token_ids(harness: Any) -> None:
    answer = harness.continuation([1, 2], 8)
    engine = harness.pretended(ending_tokens=(answer[3],))
    assert harness.run_one(engine, harness.request([1, 2], ignore_eos=True)).tokens == answer
    stopped = harness.run_one(engine, harness.request([1, 2], ignore_eos=True, stop_token_ids=(answer[5],)))
    assert stopped.tokens == answer[:6]


def test_a_stop_string_that_names_a_special_token_stops_at_it(harness: Any) -> None:
    engine = harness.pretended()
    (end,) = engine.tokenizer.convert_tokens_to_ids(["<|end|>"])
    engine._model.runner.forward = Typist("abc", harness.vocab_size, last=end).forward
    outcome = harness.run_one(engine, harness.request([1], stop=("<|end|>",)))
    assert (outcome.text, outcome.tokens[-1], outcome.finish_reason) == ("abc", end, "stop")


def test_min_tokens_puts_off_the_end(harness: Any) -> None:
    answer = harness.continuation([1, 2], 4)
    engine = harness.pretended(ending_tokens=(answer[0],))
    outcome = harness.run_one(engine, harness.request([1, 2], min_tokens=5, max_tokens=20))
    assert len(outcome.tokens) > 5
    assert answer[0] not in outcome.tokens[:5]


class Typist:
    """A model that types a text, byte by byte, and `last` after it, whatever it is asked."""

    def __init__(self, text: str, vocab_size: int, last: int = 0) -> None:
        self.tokens, self.vocab_size, self.position = [*text.encode(), last], vocab_size, 0

    def forward(self, batch: ForwardBatch) -> Tensor:
        logits = torch.zeros(len(batch.logits_rows), self.vocab_size)
        logits[:, self.tokens[self.position]] = 9.0
        self.position += 1
        return logits


@pytest.mark.parametrize(
    ("params", "text", "reason"),
    [
        ({}, "Hello wörld, bye", "length"),
        ({"stop": (",",)}, "Hello wörld", "stop"),
        ({"stop": ("rld", "o w")}, "Hell", "stop"),
        ({"stop": ("o w",), "include_stop_str_in_output": True}, "Hello w", "stop"),
        ({"stop": ("ö",)}, "Hello w", "stop"),
        ({"stop": ("bye!",)}, "Hello wörld, bye", "length"),
        ({"stop": ("l", "bye"), "min_tokens": 6}, "Hello wör", "stop"),
        ({"stop": ("e",), "max_tokens": 17}, "H", "stop"),
    ],
)
def test_stop_strings_end_the_text(harness: Any, params: dict[str, Any], text: str, reason: str) -> None:
    typed = "Hello wörld, bye"
    engine = harness.pretended(runner=Typist(typed, harness.vocab_size))
    outcome = harness.run_one(engine, harness.request([1], **({"max_tokens": len(typed.encode())} | params)))
    assert (outcome.text, outcome.finish_reason) == (text, reason)
    shown = ""
    for delta in outcome.deltas:
        shown += delta.text
        assert text.startswith(shown)


def test_logprobs_come_with_their_tokens_and_texts(harness: Any) -> None:
    outcome = harness.run_one(harness.pretended(), harness.request([7], logprobs=2, max_tokens=3))
    expected = 10 - math.log(math.exp(10) + harness.vocab_size - 1)
    for token, entry in zip(outcome.tokens, outcome.logprobs, strict=True):
        assert entry.chosen == entry.top[0]
        assert entry.chosen[0] == token
        assert entry.chosen[1] == pytest.approx(expected, abs=1e-5)
        assert entry.chosen[2] == (bytes([token]).decode(errors="replace") if token < 256 else "")
        assert len(entry.top) == 2


class Faulty:
    """Wraps a runner; breaks for sequences whose last token is 255."""

    def __init__(self, runner: Any, fault: str) -> None:
        self.runner, self.fault = runner, fault

    def forward(self, batch: ForwardBatch) -> Tensor:
        logits: Tensor = self.runner.forward(batch)
        bad = batch.token_ids[batch.logits_rows.long()] == 255
        if self.fault == "raise" and bool(bad.any()):
            raise RuntimeError("broken kernel")
        logits[bad] = {"nan": math.nan, "inf": math.inf}.get(self.fault, 0.0)
        return logits


@pytest.mark.parametrize("fault", ["nan", "inf"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_numbers_end_their_request_only(harness: Any, fault: str, temperature: float) -> None:
    engine = harness.pretended(runner=Faulty(harness.PretendedRunner(64, 4), fault))
    prompt = [*range(9), 255]
    outcomes = harness.run(
        engine, harness.request(prompt, "bad", temperature=temperature), harness.request([1, 2], "good")
    )
    assert outcomes["bad", 0].finish_reason == "error"
    assert outcomes["bad", 0].error is not None
    assert "not numbers" in outcomes["bad", 0].error
    assert outcomes["good", 0].tokens == harness.continuation([1, 2], 8)
    again = harness.run_one(engine, harness.request([*prompt[:-1], 9], "again"))
    assert again.num_cached_tokens == 0, "keys of the failed request were reused"


def test_a_failing_forward_ends_the_request_that_causes_it_and_no_other(harness: Any) -> None:
    engine = harness.pretended(runner=Faulty(harness.PretendedRunner(64, 4), "raise"))
    outcomes = harness.run(
        engine, harness.request([1, 2], "before"), harness.request([255], "bad"), harness.request([3], "after")
    )
    assert (outcomes["bad", 0].finish_reason, outcomes["bad", 0].error) == (
        "error",
        "the forward failed: broken kernel",
    )
    assert outcomes["before", 0].tokens == harness.continuation([1, 2], 8)
    assert outcomes["after", 0].tokens == harness.continuation([3], 8)


def test_seeded_requests_repeat_through_preemption_and_company(harness: Any) -> None:
    def request(request_id: str) -> Any:
        return harness.request([5, 6], request_id, temperature=6.0, seed=11, max_tokens=20)

    alone = harness.run_one(harness.pretended(), request("a"))
    crowded = harness.pretended(num_kv_blocks=9, max_model_len=36, max_num_batched_tokens=9)
    others = [
        harness.request(p[:16], str(i), max_tokens=16, temperature=2.0, top_k=5) for i, p in enumerate(prompts(6))
    ]
    outcomes = harness.run(crowded, *others[:3], request("a"), *others[3:])
    assert crowded.stats().preemptions > 0
    assert outcomes["a", 0].tokens == alone.tokens


def test_stats_count_what_happened(harness: Any) -> None:
    engine = harness.pretended(max_num_seqs=1)
    for index in range(3):
        engine.add_request(harness.request([1, 2, 3], str(index), max_tokens=4))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used, stats.kv_blocks_total) == (1, 2, 1, 64)
    harness.run(engine)
    assert (engine.stats().prompt_tokens, engine.stats().generation_tokens) == (9, 12)
