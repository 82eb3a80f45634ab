"""The streamed forward: chunks, progress, bad tokens, memory of one block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import UsageError
from aphroquant.models import streamed
from aphroquant.models.streamed import StreamedModel

TinyCheckpoint = Callable[..., Path]


def test_the_size_of_the_chunks_changes_nothing(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StreamedModel(open_checkpoint(tiny_checkpoint("llama")))
    windows = torch.randint(0, 360, (5, 16))
    whole = model.hidden_states(windows)
    for tokens in (1, 16, 40):  # less than a window, one window, two and a half
        monkeypatch.setattr(streamed, "CHUNK_TOKENS", tokens)
        torch.testing.assert_close(model.hidden_states(windows), whole, rtol=0, atol=1e-5)


def test_progress_counts_the_blocks(tiny_checkpoint: TinyCheckpoint) -> None:
    seen: list[tuple[int, int]] = []
    model = StreamedModel(open_checkpoint(tiny_checkpoint("llama")))
    model.hidden_states(torch.zeros(1, 4, dtype=torch.int64), on_block=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("token", [-1, 384, 10**9])
def test_a_token_outside_the_vocabulary_is_refused(token: int, tiny_checkpoint: TinyCheckpoint) -> None:
    model = StreamedModel(open_checkpoint(tiny_checkpoint("llama")))
    with pytest.raises(UsageError, match=f"token id {token} is outside the model's vocabulary of 384"):
        model.hidden_states(torch.tensor([[1, token]]))


def test_no_gradient_is_recorded(tiny_checkpoint: TinyCheckpoint) -> None:
    model = StreamedModel(open_checkpoint(tiny_checkpoint("llama")))
    hidden = model.hidden_states(torch.zeros(1, 4, dtype=torch.int64))
    assert not hidden.requires_grad
    assert not model.logits(hidden[0]).requires_grad
