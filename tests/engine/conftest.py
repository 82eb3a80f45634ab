"""Engines for tests: on tiny real models, and on a pretended model that is fast and exactly predictable."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from aphroquant.checkpoint import open_checkpoint
from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.engine import Engine
from aphroquant.engine.kv_cache import KVCache, KVScheme
from aphroquant.engine.loading import LoadedModel
from aphroquant.engine.runner import ReferenceRunner, RunnerChoice
from aphroquant.engine.types import Delta, EngineConfig, GenerationRequest, SamplingParams
from aphroquant.models.decoder import Linear
from aphroquant.models.loader import dense_linear
from aphroquant.schemes import QuantizedWeight

VOCAB_SIZE = 300


class PretendedRunner:
    """A model whose next token is a hash of all tokens before it, read from its own paged memory.

    A wrong slot, block table, position or context length leads to other tokens than `continuation` expects.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = VOCAB_SIZE) -> None:
        self.memory = torch.full((num_blocks, block_size), -1)
        self.vocab_size = vocab_size
        self.num_forwards = 0
        self.num_tokens = 0

    def forward(self, batch: ForwardBatch) -> Tensor:
        self.num_forwards += 1
        self.num_tokens += batch.num_tokens
        self.memory.view(-1)[batch.slot_mapping] = batch.token_ids.long()
        starts = batch.query_start.tolist()
        logits = torch.zeros(len(batch.logits_rows), self.vocab_size)
        for index, row in enumerate(batch.logits_rows.tolist()):
            sequence = next(s for s in range(batch.num_sequences) if starts[s] <= row < starts[s + 1])
            context_len = int(batch.context_lens[sequence])
            assert int(batch.positions[row]) == context_len - 1
            context = self.memory[batch.block_tables[sequence].long()].flatten()[:context_len].tolist()
            logits[index, next_token(context, self.vocab_size)] = 10.0
        return logits


def next_token(context: Sequence[int], vocab_size: int = VOCAB_SIZE) -> int:
    assert all(token >= 0 for token in context), "unwritten memory was read"
    digest = hashlib.sha256(repr(list(context)).encode()).digest()
    return int.from_bytes(digest[:4], "little") % vocab_size


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What the pretended model answers to a prompt."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context))
    return context[len(prompt) :]


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i; <|end|> is special, the rest of VOCAB_SIZE is padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


class DenseBackend:
    """Linears with dequantized weights."""

    name, reason = "dense", "for tests"

    def prepare(self, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        return dense_linear("", weight, bias)


class Outcome:
    """All deltas of one choice, joined."""

    def __init__(self, deltas: list[Delta]) -> None:
        self.deltas = deltas
        self.tokens = [token for delta in deltas for token in delta.token_ids]
        self.text = "".join(delta.text for delta in deltas)
        self.logprobs = [entry for delta in deltas for entry in delta.logprobs]
        self.finish_reason = deltas[-1].finish_reason
        self.error = deltas[-1].error
        self.num_cached_tokens = deltas[-1].num_cached_tokens


class Harness:
    """What tests of the engine share."""

    vocab_size = VOCAB_SIZE
    continuation = staticmethod(continuation)
    PretendedRunner = PretendedRunner

    def __init__(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        self._byte_tokenizer = byte_tokenizer

    def pretended(
        self,
        *,
        num_kv_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 200,
        ending_tokens: tuple[int, ...] = (),
        runner: Any = None,
        **settings: Any,
    ) -> Engine:
        """An engine on the pretended model. `settings` are fields of EngineConfig."""
        model = LoadedModel(
            runner=runner or PretendedRunner(num_kv_blocks, block_size),
            runner_choice=RunnerChoice("reference", "for tests"),
            tokenizer=self._byte_tokenizer,
            vocab_size=VOCAB_SIZE,
            num_kv_blocks=num_kv_blocks,
            max_model_len=min(max_model_len, num_kv_blocks * block_size),
            ending_tokens=frozenset(ending_tokens),
        )
        return Engine(EngineConfig("pretended", block_size=block_size, **settings), model=model)

    def reference(
        self,
        path: Path,
        *,
        kv_cache_dtype: str = "float32",
        num_kv_blocks: int = 64,
        block_size: int = 8,
        **settings: Any,
    ) -> Engine:
        """An engine on a checkpoint, with the reference runner and dense linears; nothing ends an answer early."""
        checkpoint = open_checkpoint(path)
        cache = KVCache(checkpoint.spec, KVScheme.named(kv_cache_dtype), num_kv_blocks, block_size)
        model = LoadedModel(
            runner=ReferenceRunner(checkpoint, cache, DenseBackend()),
            runner_choice=RunnerChoice("reference", "for tests"),
            tokenizer=checkpoint.tokenizer(),
            vocab_size=checkpoint.spec.vocab_size,
            num_kv_blocks=num_kv_blocks,
            max_model_len=min(checkpoint.spec.max_position_embeddings, num_kv_blocks * block_size),
            ending_tokens=frozenset(),
        )
        return Engine(EngineConfig(str(path), block_size=block_size, **settings), model=model)

    @staticmethod
    def request(
        prompt: Sequence[int], request_id: str = "r", *, cache_salt: str = "", **params: Any
    ) -> GenerationRequest:
        """A request that is greedy and short unless said otherwise."""
        sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | params))
        return GenerationRequest(
            request_id=request_id, prompt_token_ids=list(prompt), sampling=sampling, cache_salt=cache_salt
        )

    @staticmethod
    def run(engine: Engine, *requests: GenerationRequest) -> dict[tuple[str, int], Outcome]:
        """Add the requests and step until all have ended; the books are checked after every step."""
        for request in requests:
            engine.add_request(request)
        deltas: dict[tuple[str, int], list[Delta]] = {}
        while engine.has_unfinished():
            for delta in engine.step():
                own = deltas.setdefault((delta.request_id, delta.index), [])
                assert not own or own[-1].finish_reason is None, "a delta after the last one"
                own.append(delta)
            engine.check()
        assert engine.stats().kv_blocks_used == 0, "blocks leaked"
        return {key: Outcome(own) for key, own in deltas.items()}

    def run_one(self, engine: Engine, request: GenerationRequest) -> Outcome:
        return self.run(engine, request)[request.request_id, 0]


@pytest.fixture(scope="session")
def harness(byte_tokenizer: PreTrainedTokenizerFast) -> Harness:
    return Harness(byte_tokenizer)
