"""Properties of the block forward that hold whatever the weights: causality, window reach, norm precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.checkpoint import open_checkpoint
from aphroquant.models.decoder import rms_norm
from aphroquant.models.streamed import StreamedModel

TinyCheckpoint = Callable[..., Path]


def hidden_states(path: Path, windows: torch.Tensor) -> torch.Tensor:
    return StreamedModel(open_checkpoint(path)).hidden_states(windows)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_token_changes_nothing_before_it(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    path = tiny_checkpoint(family)
    windows = torch.randint(0, 360, (1, 20))
    changed = windows.clone()
    changed[0, 12] = (windows[0, 12] + 1) % 360
    before, after = hidden_states(path, windows), hidden_states(path, changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


def test_a_sliding_window_reaches_no_further_than_it_says(tiny_checkpoint: TinyCheckpoint) -> None:
    window, num_layers = 4, 2
    path = tiny_checkpoint("mistral", sliding_window=window)
    windows = torch.randint(0, 360, (1, 20))
    changed = windows.clone()
    changed[0, 0] = (windows[0, 0] + 1) % 360
    difference = (hidden_states(path, windows) - hidden_states(path, changed)).abs().amax(-1)[0]
    reach = num_layers * (window - 1)  # each layer passes news on by window - 1 positions
    assert difference[reach] > 0
    assert difference[reach + 1 :].max() == 0


def test_windows_do_not_see_each_other(tiny_checkpoint: TinyCheckpoint) -> None:
    path = tiny_checkpoint("llama")
    windows = torch.randint(0, 360, (3, 17))
    together = hidden_states(path, windows)
    alone = torch.cat([hidden_states(path, windows[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_rms_norm_is_computed_in_float32_whatever_the_input() -> None:
    x = torch.full((1, 256), 300.0, dtype=torch.float16)  # the square overflows float16
    assert torch.equal(rms_norm(x, torch.ones(256, dtype=torch.float16), 1e-6), torch.ones_like(x))
    assert rms_norm(x.double(), torch.ones(256), 0.0).dtype == torch.float64


def test_rms_norm_equals_that_of_torch() -> None:
    x, gain = torch.randn(7, 48), torch.randn(48)
    expected = torch.nn.functional.rms_norm(x, (48,), gain, 1e-5)
    torch.testing.assert_close(rms_norm(x, gain, 1e-5), expected, rtol=1e-6, atol=1e-6)
