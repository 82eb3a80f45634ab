"""E[x**2] of the inputs of every layer, as the source itself computes them: what GGUF's encoders weigh errors with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from aphroquant.calibration.data import CalibrationData, calibration_windows
from aphroquant.calibration.statistics import StatisticsCollector
from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.activations import Activations, chunks, default_memory_limit
from aphroquant.conversion.calibration_block import CalibrationBlock, load_calibration_block
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.request import ConversionRequest
from aphroquant.errors import InputError, UsageError
from aphroquant.models.loader import load_embedding
from aphroquant.models.spec import DOWN, GATE, INPUT_NORM, POST_ATTENTION_NORM, UP, K, O, Q, V


def read_windows(checkpoint: Checkpoint, request: ConversionRequest) -> CalibrationData:
    """The calibration text that a request names. UsageError for windows longer than the model's context."""
    longest = checkpoint.spec.max_position_embeddings
    if request.seq_len > longest:
        raise UsageError(f"seq_len = {request.seq_len} is longer than the model's context of {longest} tokens")
    return calibration_windows(
        checkpoint.tokenizer(),
        request.calibration,
        samples=request.samples,
        seq_len=request.seq_len,
        seed=request.seed,
    )


@torch.no_grad()
def gather_importance(checkpoint: Checkpoint, windows: Tensor, progress: Progress) -> dict[str, Tensor]:
    """Module -> E[x**2], float32 [in_features], over all windows [S, T]; one block in memory at a time."""
    hidden = _embedded(checkpoint, windows)
    importance: dict[str, Tensor] = {}
    num_layers, window_len = checkpoint.spec.num_layers, windows.shape[1]
    for layer in range(num_layers):
        block = load_calibration_block(checkpoint, layer, window_len)
        for norm, first, last, inner in (
            (INPUT_NORM, (Q, K, V), O, block.attention_mix),
            (POST_ATTENTION_NORM, (GATE, UP), DOWN, block.mlp_inner),
        ):
            importance |= _half(block, hidden, norm, first, last, inner)
        progress.block(layer + 1, num_layers)
    return importance


def _half(
    block: CalibrationBlock,
    hidden: Activations,
    norm: str,
    first: tuple[str, ...],
    last: str,
    inner: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Of the attention or the MLP, which `hidden` has passed through afterwards."""
    collectors = {
        name: StatisticsCollector(
            f"{block.prefix}.{name}", block.linears[name].weight.shape[1], block.window_len, second_moment=False
        )
        for name in (first[0], last)
    }
    for rows in _chunks(hidden, block.window_len):
        normed = block.block.norm(norm, hidden.rows[rows])
        collectors[first[0]].update(normed)
        mixed = inner(normed)
        collectors[last].update(mixed)
        hidden.rows[rows] += block.linears[last](mixed)
    found = {name: collector.finish().mean_square for name, collector in collectors.items()}
    shared = dict.fromkeys(first, found[first[0]]) | {last: found[last]}
    return {f"{block.prefix}.{name}": square for name, square in shared.items()}


def _embedded(checkpoint: Checkpoint, windows: Tensor) -> Activations:
    ids, spec = windows.reshape(-1), checkpoint.spec
    if ids.numel() and int(ids.max()) >= spec.vocab_size:
        raise InputError(
            f"the tokenizer gives token id {int(ids.max())}, but the model's vocabulary ends at {spec.vocab_size}"
        )
    hidden = Activations(ids.numel(), spec.hidden_size, memory_limit=default_memory_limit())
    embedding = load_embedding(checkpoint)
    for rows in chunks(ids.numel(), windows.shape[1]):
        hidden.rows[rows] = embedding[ids[rows]]
    return hidden


def _chunks(hidden: Activations, window_len: int) -> Iterator[slice]:
    return chunks(len(hidden), window_len)
