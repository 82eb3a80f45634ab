"""A decoder's forward over many windows with one block in memory at a time.

Peak memory is about one dequantized block, the hidden states of all windows and one chunk's activations, whatever the
size of the model: each block is loaded once, applied to all windows chunk by chunk, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.reference.matmul import linear
from aphroquant.models.decoder import CosSin, causal_attention, rms_norm
from aphroquant.models.loader import MakeLinear, load_block, load_embedding, load_final_norm, load_head
from aphroquant.models.rope import cos_sin

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint

CHUNK_TOKENS = 1024  # at most this many tokens (or one window) go through a block at once; 2048 was no faster
OnBlock = Callable[[int, int], None]  # blocks done, blocks in all


class StreamedModel:
    """Teacher-forced forward of a checkpoint. Windows are independent sequences that begin at position 0.

    `make_linear` chooses how the linears of the blocks compute (default: the dequantized weight, in `dtype`).
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, make_linear: MakeLinear | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.dtype = dtype
        self.make_linear = make_linear

    @torch.no_grad()
    def hidden_states(self, windows: Tensor, on_block: OnBlock | None = None) -> Tensor:
        """Hidden states [B, S, H] after the final norm for token ids [B, S]."""
        batch, window_len = windows.shape
        hidden = self._embed(windows)  # [B * S, H]
        chunk = max(1, CHUNK_TOKENS // window_len) * window_len
        positions = torch.arange(window_len).repeat(chunk // window_len)
        rope = cos_sin(self.spec.rope, self.spec.head_dim, positions)  # [chunk, d / 2] each
        for layer in range(self.spec.num_layers):
            self._apply_block(hidden, layer, window_len, rope)
            if on_block is not None:
                on_block(layer + 1, self.spec.num_layers)
        gain = load_final_norm(self.checkpoint, self.dtype)
        for part in _parts(hidden, chunk):
            part.copy_(rms_norm(part, gain, self.spec.norm_eps))
        return hidden.view(batch, window_len, -1)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of hidden states [T, H]."""
        return linear(hidden, self._head)

    def _embed(self, windows: Tensor) -> Tensor:
        ids = windows.reshape(-1)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.spec.vocab_size):
            worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
            raise UsageError(f"token id {worst} is outside the model's vocabulary of {self.spec.vocab_size}")
        return load_embedding(self.checkpoint, self.dtype)[ids]

    def _apply_block(self, hidden: Tensor, layer: int, window_len: int, rope: CosSin) -> None:
        """Replace all hidden states [B * S, H] by the block's output, in place."""
        block = load_block(self.checkpoint, layer, self.dtype, self.make_linear)
        attend = causal_attention(self.spec, window_len)
        cos, sin = rope
        for part in _parts(hidden, len(cos)):
            part.copy_(block.forward(part, (cos[: len(part)], sin[: len(part)]), attend))

    @cached_property
    def _head(self) -> Tensor:
        return load_head(self.checkpoint, self.dtype)


def _parts(hidden: Tensor, chunk: int) -> Iterator[Tensor]:
    """Views of `chunk` rows each; the last may be shorter."""
    return (hidden[start : start + chunk] for start in range(0, len(hidden), chunk))
