"""Runners: from a batch to logits. The reference in torch and a thin one around the compiled decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.kv_cache import KVCache
from aphroquant.kernels.reference.attention import paged_attention
from aphroquant.kernels.reference.matmul import linear
from aphroquant.models.decoder import rms_norm
from aphroquant.models.loader import load_block, load_embedding, load_final_norm, load_head
from aphroquant.models.rope import cos_sin
from aphroquant.models.spec import LM_HEAD

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint
    from aphroquant.kernels.dispatch import Backend


class Runner(Protocol):
    """One forward: stores the keys and values of the batch's tokens and gives float32 logits [R, V]."""

    def forward(self, batch: ForwardBatch) -> Tensor: ...


class RunnerChoice(NamedTuple):
    """Which runner serves a model, and why."""

    kind: Literal["native", "reference", "cuda"]
    reason: str


class ReferenceRunner:
    """The decoder of aphroquant.models in float32, with linears from a kernel backend and paged attention in torch."""

    def __init__(self, checkpoint: Checkpoint, cache: KVCache, backend: Backend) -> None:
        self._spec, self._cache = checkpoint.spec, cache
        self._blocks = [
            load_block(checkpoint, layer, make_linear=lambda _, weight, bias: backend.prepare(weight, bias))
            for layer in range(self._spec.num_layers)
        ]
        self._embedding = load_embedding(checkpoint)
        self._head = load_head(checkpoint) if LM_HEAD in checkpoint.schemes() else self._embedding
        self._final_norm = load_final_norm(checkpoint)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        spec, cache = self._spec, self._cache

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            cache.store(layer, batch.slot_mapping, k, v)
            return paged_attention(
                q, batch, cache.layer(layer), scale=spec.head_dim**-0.5, sliding_window=spec.sliding_windows[layer]
            )

        rope = cos_sin(spec.rope, spec.head_dim, batch.positions)
        hidden = self._embedding[batch.token_ids]  # [T, H]
        for block in self._blocks:
            hidden = block.forward(hidden, rope, attend)
        last = rms_norm(hidden[batch.logits_rows], self._final_norm, spec.norm_eps)  # [R, H]
        return linear(last, self._head)


class NativeRunner:
    """The whole forward in one call of the compiled library."""

    def __init__(self, checkpoint: Checkpoint, cache: KVCache, *, activations: str, num_threads: int | None) -> None:
        from aphroquant.kernels.cpu.decoder import NativeDecoder

        self._decoder = NativeDecoder(checkpoint, cache, activations=activations, num_threads=num_threads)

    def forward(self, batch: ForwardBatch) -> Tensor:
        logits: Tensor = self._decoder.forward(batch)
        return logits


def choose_runner(checkpoint: Checkpoint, backend: str) -> RunnerChoice:
    """The compiled decoder wherever it can run the model, unless the reference is asked for."""
    if backend == "reference":
        return RunnerChoice("reference", "asked for")
    from aphroquant.kernels.cpu.decoder import NativeDecoder

    obstacle = NativeDecoder.supports(checkpoint.spec, checkpoint.schemes())
    if obstacle is None:
        return RunnerChoice("native", "the compiled decoder supports the model")
    return RunnerChoice("reference", obstacle)


def make_runner(
    choice: RunnerChoice,
    checkpoint: Checkpoint,
    cache: KVCache,
    *,
    backend: str,
    activations: str,
    num_threads: int | None,
) -> Runner:
    """Load the weights into the chosen runner."""
    if choice.kind == "native":
        return NativeRunner(checkpoint, cache, activations=activations, num_threads=num_threads)
    from aphroquant.kernels.dispatch import select_backend

    return ReferenceRunner(checkpoint, cache, select_backend(backend, activations=activations))
