"""A decoder's forward over many windows with one block in memory at a time.

Peak memory is about one dequantized block, the hidden states of all windows and one chunk's activations, whatever the
size of the model: each block is loaded once, applied to all windows chunk by chunk, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.reference.matmul import linear
from aphroquant.models.decoder import CosSin, Linear, causal_attention, rms_norm
from aphroquant.models.loader import (
    MakeLinear,
    dense_linear,
    load_block,
    load_embedding,
    load_final_norm,
    load_head,
)
from aphroquant.models.rope import cos_sin
from aphroquant.models.rounded import RoundedBlock, rounded
from aphroquant.schemes import QuantizedWeight

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint

CPU = torch.device("cpu")
CHUNK_TOKENS = 1024  # at most this many tokens (or one window) go through a block at once; 2048 was no faster
OnBlock = Callable[[int, int], None]  # blocks done, blocks in all


@dataclass(frozen=True)
class Batch:
    """Windows of one length [B, S]; `rounding` is a dtype that their activations are rounded to (RoundedBlock)."""

    windows: Tensor
    rounding: torch.dtype | None = None

    @property
    def window_len(self) -> int:
        return self.windows.shape[1]

    @property
    def chunk(self) -> int:
        """Tokens that go through a block at once: whole windows."""
        return max(1, CHUNK_TOKENS // self.window_len) * self.window_len

    def rounded(self, x: Tensor) -> Tensor:
        """x, with the values that `rounding` holds."""
        return x if self.rounding is None else rounded(x, self.rounding)


@dataclass(frozen=True)
class _States:
    """A batch on its way through the blocks: hidden states [B * S, H], changed in place, and rotary factors."""

    hidden: Tensor
    batch: Batch
    rope: CosSin


class StreamedModel:
    """Teacher-forced forward of a checkpoint. Windows are independent sequences that begin at position 0.

    `make_linear` chooses how the linears of the blocks compute (default: the dequantized weight, in `dtype`); they do
    so on `device`, where a block is brought when its turn comes. Hidden states of all windows stay on the CPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        make_linear: MakeLinear | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.dtype = dtype
        self.make_linear = make_linear or partial(dense_linear, dtype=dtype)
        self.device = device

    @torch.no_grad()
    def hidden_states(self, windows: Tensor, on_block: OnBlock | None = None) -> Tensor:
        """Hidden states [B, S, H] after the final norm for token ids [B, S], on the CPU."""
        return self.hidden_states_of([Batch(windows)], on_block)[0]

    @torch.no_grad()
    def hidden_states_of(self, batches: Sequence[Batch], on_block: OnBlock | None = None) -> list[Tensor]:
        """The same for several batches, whose windows may differ in length, with every block loaded once."""
        embedding = load_embedding(self.checkpoint, self.dtype)
        states = [_States(self._embed(embedding, batch.windows), batch, self._rope(batch)) for batch in batches]
        del embedding
        for layer in range(self.spec.num_layers):
            self._apply_block(layer, states)
            if on_block is not None:
                on_block(layer + 1, self.spec.num_layers)
        gain = load_final_norm(self.checkpoint, self.dtype)
        for state in states:
            for part in _parts(state.hidden, state.batch.chunk):
                part.copy_(state.batch.rounded(rms_norm(part, gain, self.spec.norm_eps)))
        return [state.hidden.view(*state.batch.windows.shape, -1) for state in states]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of hidden states [T, H], on the model's device."""
        return linear(hidden.to(self.device), self._head)

    def _embed(self, embedding: Tensor, windows: Tensor) -> Tensor:
        """[B * S, H]"""
        ids = windows.reshape(-1)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.spec.vocab_size):
            worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
            raise UsageError(f"token id {worst} is outside the model's vocabulary of {self.spec.vocab_size}")
        return embedding[ids]

    def _rope(self, batch: Batch) -> CosSin:
        positions = torch.arange(batch.window_len).repeat(batch.chunk // batch.window_len)
        cos, sin = cos_sin(self.spec.rope, self.spec.head_dim, positions)  # [chunk, d / 2] each
        return cos.to(self.device), sin.to(self.device)

    def _apply_block(self, layer: int, states: Sequence[_States]) -> None:
        """Replace all hidden states [B * S, H] by the block's output, in place."""
        block = load_block(self.checkpoint, layer, self.dtype, self._linear)
        block.norms = {name: gain.to(self.device) for name, gain in block.norms.items()}
        for state in states:
            own = block if state.batch.rounding is None else RoundedBlock(block, state.batch.rounding)
            attend = causal_attention(self.spec, state.batch.window_len)
            cos, sin = state.rope
            for part in _parts(state.hidden, state.batch.chunk):
                rows = part.to(self.device)
                part.copy_(own.forward(rows, (cos[: len(rows)], sin[: len(rows)]), attend))

    def _linear(self, name: str, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        return self.make_linear(name, weight.to(self.device), None if bias is None else bias.to(self.device))

    @cached_property
    def _head(self) -> Tensor:
        return load_head(self.checkpoint, self.dtype).to(self.device)


def _parts(hidden: Tensor, chunk: int) -> Iterator[Tensor]:
    """Views of `chunk` rows each; the last may be shorter."""
    return (hidden[start : start + chunk] for start in range(0, len(hidden), chunk))
