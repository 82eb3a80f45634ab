"""An engine process without a model: its answers are a known function of the prompt, and some prompts make trouble.

The tokens are bytes. Prompts with one of these words do what it says: REJECT, BROKEN, ERROR, STALL, SLOW, CRASH, KILL.
FAKE_ENGINE in the environment is a JSON object of Options.
"""

from __future__ import annotations

import os
import signal
import time
import zlib
from dataclasses import dataclass

import msgspec

from aphroquant.engine.types import Delta, EngineConfig, EngineStats, GenerationRequest, TokenLogprobs
from aphroquant.errors import InputError, RequestError, UsageError
from aphroquant.server.engine_process import run
from aphroquant.server.messages import Ready

DEFAULT_LEN = 8


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """How the fake behaves from the start."""

    step_seconds: float = 0.0
    start: str = "ok"  # ok | missing | usage | memory | bug | exit | kill | hang
    max_model_len: int = 512


@dataclass
class _Choice:
    request: GenerationRequest
    index: int
    num_tokens: int = 0


def word(prompt: bytes, index: int, number: int, seed: int | None) -> str:
    """Token `number` of choice `index` of the answer to a prompt."""
    return f"{zlib.crc32(prompt + bytes([index]) + str(seed).encode()):08x}.{number} "


class FakeEngine:
    """One token a step for every choice."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._choices: list[_Choice] = []
        self._prompt_tokens = self._generation_tokens = 0

    def add_request(self, request: GenerationRequest) -> None:
        prompt = bytes(request.prompt_token_ids)
        if b"REJECT" in prompt:
            raise RequestError("the prompt can never fit the KV cache", param="prompt", code="too_large")
        if b"BROKEN" in prompt:
            raise ValueError("secret detail")
        self._prompt_tokens += len(prompt)
        self._choices += [_Choice(request, index) for index in range(request.sampling.n)]

    def abort(self, request_id: str) -> None:
        self._choices = [choice for choice in self._choices if choice.request.request_id != request_id]

    def has_unfinished(self) -> bool:
        return bool(self._choices)

    def step(self) -> list[Delta]:
        prompts = [bytes(choice.request.prompt_token_ids) for choice in self._choices]
        if any(b"CRASH" in prompt for prompt in prompts):
            raise RuntimeError("the fake engine crashed")
        if any(b"KILL" in prompt for prompt in prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        slow = any(b"SLOW" in prompt or b"STALL" in prompt for prompt in prompts)
        time.sleep(0.02 if slow else self._options.step_seconds)
        active = [choice for choice, prompt in zip(self._choices, prompts, strict=True) if b"STALL" not in prompt]
        deltas = [self._next(choice) for choice in active]
        finished = {id(choice) for choice, delta in zip(active, deltas, strict=True) if delta.finish_reason}
        self._choices = [choice for choice in self._choices if id(choice) not in finished]
        return deltas

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._choices),
            kv_blocks_used=2 * len(self._choices),
            kv_blocks_total=256,
            prefix_queries=40,
            prefix_hits=30,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
        )

    def _next(self, choice: _Choice) -> Delta:
        sampling = choice.request.sampling
        prompt = bytes(choice.request.prompt_token_ids)
        number = choice.num_tokens
        text = word(prompt, choice.index, number, sampling.seed)
        choice.num_tokens += 1
        self._generation_tokens += 1
        finish = "length" if choice.num_tokens == (sampling.max_tokens or DEFAULT_LEN) else None
        for stop in sampling.stop:
            if stop in text:
                text, finish = text[: text.index(stop)], "stop"
        error = "the logits are not finite" if b"ERROR" in prompt and number == 2 else None
        logprobs = []
        if sampling.logprobs is not None:
            top = [(rank, -float(rank), f"t{rank}") for rank in range(sampling.logprobs)]
            logprobs = [TokenLogprobs((number, -0.5 if number else float("-inf"), text), top)]
        return Delta(
            request_id=choice.request.request_id,
            index=choice.index,
            text=text,
            token_ids=[number],
            logprobs=logprobs,
            finish_reason="error" if error else finish,
            error=error,
            num_prompt_tokens=len(prompt),
            num_cached_tokens=3,
        )


def load(config: EngineConfig) -> tuple[FakeEngine, Ready]:
    options = msgspec.json.decode(os.environ.get("FAKE_ENGINE", "{}"), type=Options)
    _start(options.start)
    return FakeEngine(options), Ready(options.max_model_len, 4096, "fake", "asked for")


def _start(kind: str) -> None:
    match kind:
        case "missing":
            raise InputError("nowhere: no such checkpoint", hint="look elsewhere")
        case "usage":
            raise UsageError("max_model_len = 9 is too much")
        case "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        case "bug":
            raise KeyError("model.layers.0")
        case "exit":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)


if __name__ == "__main__":
    run(load)
