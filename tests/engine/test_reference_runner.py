"""The engine on tiny real models: greedy answers equal transformers' own, through paging, chunks, reuse, preemption."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aphroquant.checkpoint import open_checkpoint
from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.kv_cache import KVCache, KVScheme
from aphroquant.engine.runner import ReferenceRunner

TinyCheckpoint = Callable[..., Path]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
# Root mean square error of the logits against a float32 cache, as a share of the logits' own spread.
KV_TOLERANCE = {"bfloat16": 0.005, "float16": 0.0006, "fp8_e4m3": 0.06, "int8_per_token_head": 0.012}


class Transformers:
    """The outside judge: the same checkpoint in transformers."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def logits(self, tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([tokens])).logits[0]
        return logits

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        output = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=-1,  # nothing ends the answer early, and nothing is forbidden
        )
        return [int(token) for token in output[0, len(prompt) :]]

    def check_greedy(self, prompt: list[int], tokens: list[int]) -> None:
        """Assert that every token is the likeliest, or within float rounding of it, after those before."""
        logits = self.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        short = float((logits.amax(-1) - chosen).max())
        assert short < 1e-4, f"a token is {short:.2e} below the likeliest one"


@pytest.fixture(scope="module")
def transformers_model(tiny_checkpoint: TinyCheckpoint) -> Callable[..., Transformers]:
    made: dict[Path, Transformers] = {}

    def get(*arguments: Any, **overrides: Any) -> Transformers:
        path = tiny_checkpoint(*arguments, **overrides)
        if path not in made:
            made[path] = Transformers(path)
        return made[path]

    return get


def random_prompts(count: int, *, longest: int = 40, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    stem = [generator.randrange(3, 350) for _ in range(longest // 2)]

    def fresh() -> list[int]:
        return [generator.randrange(3, 350) for _ in range(generator.randrange(1, longest // 2))]

    return [stem[: generator.randrange(longest // 2)] + fresh() for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_transformers_token_for_token(
    harness: Any, tiny_checkpoint: TinyCheckpoint, transformers_model: Callable[..., Transformers], family: str
) -> None:
    engine = harness.reference(tiny_checkpoint(family))
    for index, prompt in enumerate(random_prompts(3)):
        outcome = harness.run_one(engine, harness.request(prompt, str(index), max_tokens=24))
        assert outcome.tokens == transformers_model(family).greedy(prompt, 24)


def test_a_sliding_window_is_kept(
    harness: Any, tiny_checkpoint: TinyCheckpoint, transformers_model: Callable[..., Transformers]
) -> None:
    overrides = {"sliding_window": 12, "num_hidden_layers": 3}
    engine = harness.reference(tiny_checkpoint("mistral", **overrides), max_num_batched_tokens=7)
    prompt = random_prompts(1, longest=80, seed=4)[0] * 2
    outcome = harness.run_one(engine, harness.request(prompt, max_tokens=30))
    assert outcome.tokens == transformers_model("mistral", **overrides).greedy(prompt, 30)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 5},
        {"max_num_batched_tokens": 64, "enable_prefix_caching": False},
        {"num_kv_blocks": 14, "block_size": 4, "max_num_batched_tokens": 20},
        {"block_size": 1, "num_kv_blocks": 200},
        {"block_size": 64, "max_num_seqs": 3},
    ],
    ids=str,
)
def test_concurrent_requests_answer_greedily_in_every_setting(
    harness: Any,
    tiny_checkpoint: TinyCheckpoint,
    transformers_model: Callable[..., Transformers],
    settings: dict[str, Any],
) -> None:
    engine = harness.reference(tiny_checkpoint("llama"), **settings)
    prompts = random_prompts(8)
    requests = [harness.request(prompt, str(index), max_tokens=14) for index, prompt in enumerate(prompts)]
    random.Random(1).shuffle(requests)
    outcomes = harness.run(engine, *requests)
    for index, prompt in enumerate(prompts):
        assert len(outcomes[str(index), 0].tokens) == 14
        transformers_model("llama").check_greedy(prompt, outcomes[str(index), 0].tokens)
    if settings.get("num_kv_blocks") == 14:
        assert engine.stats().preemptions > 0


def whole_logits(path: Path, kv_cache_dtype: str, tokens: list[int], chunk: int) -> Tensor:
    """Logits of every position, computed through the cache in chunks."""
    checkpoint = open_checkpoint(path)
    block_size, num_blocks = 8, 16
    cache = KVCache(checkpoint.spec, KVScheme.named(kv_cache_dtype), num_blocks, block_size)

    class Dense:
        name, reason = "dense", "for tests"

        def prepare(self, weight: Any, bias: Tensor | None) -> Any:
            matrix = weight.dequantize()
            return lambda x: torch.nn.functional.linear(x, matrix, bias)

    runner = ReferenceRunner(checkpoint, cache, Dense())
    table = torch.randperm(num_blocks)
    logits = []
    for first in range(0, len(tokens), chunk):
        part = tokens[first : first + chunk]
        positions = torch.arange(first, first + len(part))
        batch = ForwardBatch(
            token_ids=torch.tensor(part, dtype=torch.int32),
            positions=positions.int(),
            slot_mapping=table[positions // block_size] * block_size + positions % block_size,
            query_start=torch.tensor([0, len(part)], dtype=torch.int32),
            context_lens=torch.tensor([first + len(part)], dtype=torch.int32),
            block_tables=table[None].int(),
            logits_rows=torch.arange(len(part), dtype=torch.int32),
        )
        logits.append(runner.forward(batch))
    return torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 9, 100])
def test_logits_equal_transformers(
    tiny_checkpoint: TinyCheckpoint, transformers_model: Callable[..., Transformers], family: str, chunk: int
) -> None:
    tokens = random_prompts(1, longest=100, seed=2)[0]
    logits = whole_logits(tiny_checkpoint(family), "float32", tokens, chunk)
    error = float((logits - transformers_model(family).logits(tokens)).abs().max())
    assert error < 1e-4, f"largest difference {error:.2e}"


@pytest.mark.parametrize("kv_cache_dtype", KV_TOLERANCE)
def test_quantized_caches_change_the_logits_little(tiny_checkpoint: TinyCheckpoint, kv_cache_dtype: str) -> None:
    tokens = random_prompts(1, longest=100, seed=2)[0]
    path = tiny_checkpoint("llama")
    exact = whole_logits(path, "float32", tokens, 9)
    error = (whole_logits(path, kv_cache_dtype, tokens, 9) - exact).pow(2).mean().sqrt() / exact.std()
    assert 0 < error < KV_TOLERANCE[kv_cache_dtype], f"{kv_cache_dtype}: {error:.4f}"


def test_a_batch_without_logits_gives_none(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    assert whole_logits(tiny_checkpoint("llama"), "float32", [1], 1).shape == (1, checkpoint.spec.vocab_size)
