"""The engine on the compiled decoder: the same bits whatever the batch, and transformers' answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aphroquant import LLM, SamplingParams
from aphroquant.errors import UsageError
from aphroquant.kernels.cpu.library import obstacle

TinyCheckpoint = Callable[..., Path]
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 12}),
    ("qwen2", {}),
    ("qwen3", {}),
]

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"no compiled library: {obstacle()}")


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    generator = random.Random(5)
    stem = [generator.randrange(3, 350) for _ in range(longest)]
    return [
        stem[: generator.randrange(longest // 2)] + [generator.randrange(3, 350)] * generator.randrange(1, longest // 2)
        for _ in range(count)
    ]


def native(path: Path, **settings: Any) -> LLM:
    return LLM(str(path), **({"backend": "auto", "num_kv_blocks": 64, "num_threads": 1} | settings))


@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_greedy_answers_equal_transformers(
    tiny_checkpoint: TinyCheckpoint, family: str, overrides: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_checkpoint(family, **overrides)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    llm = native(path)
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for prompt, generation in zip(prompts(3), llm.generate(prompts(3), sampling), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *generation.token_ids]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        short = float((logits.amax(-1) - chosen).max())
        assert short < 1e-3, f"a token is {short:.2e} below the likeliest one"


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "float16", "fp8_e4m3", "int8_per_token_head"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 7, "enable_prefix_caching": False},
        {"num_kv_blocks": 14, "block_size": 4, "max_num_batched_tokens": 20},
    ],
    ids=str,
)
def test_company_memory_and_chunks_change_no_bit(
    tiny_checkpoint: TinyCheckpoint, kv_cache_dtype: str, settings: dict[str, Any]
) -> None:
    path = tiny_checkpoint("llama")
    many = prompts(8)
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=10, ignore_eos=True, logprobs=2)
    alone = native(path, kv_cache_dtype=kv_cache_dtype, enable_prefix_caching=False)
    crowded = native(path, kv_cache_dtype=kv_cache_dtype, **settings)
    for prompt, generation in zip(many, crowded.generate(many, sampling), strict=True):
        (expected,) = alone.generate([prompt], sampling)
        assert generation.token_ids == expected.token_ids
        assert generation.logprobs == expected.logprobs
    if settings.get("num_kv_blocks") == 14:
        assert crowded.engine.stats().preemptions > 0


def test_the_compiled_runner_is_chosen_and_says_why(
    tiny_checkpoint: TinyCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "aphroquant.engine"):
        native(tiny_checkpoint("llama"))
    assert "runner: native (the compiled decoder supports the model)" in caplog.text


def test_asking_for_the_cpu_backend_without_it_is_refused(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aphroquant.kernels.cpu.library.obstacle", lambda: "it was not built")
    monkeypatch.setattr("aphroquant.kernels.cpu.decoder.obstacle", lambda: "it was not built")
    with pytest.raises(UsageError, match="it was not built"):
        native(tiny_checkpoint("llama"), backend="cpu")


@pytest.mark.sample_model
def test_the_sample_model_answers(sample_model: Path) -> None:
    llm = LLM(str(sample_model), activations="float", num_kv_blocks=64)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (generation,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=32))
    assert generation.text == "The capital of France is Paris."
    assert generation.finish_reason == "stop"
