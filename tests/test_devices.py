"""Which device computes."""

from __future__ import annotations

import pytest
import torch

from aphroquant.devices import torch_device
from aphroquant.errors import UsageError


def test_auto_is_the_gpu_if_there_is_one() -> None:
    assert torch_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"device cuda cannot be used: torch .* sees no GPU") as caught:
        torch_device("cuda")
    assert caught.value.hint is not None


def test_other_names_are_refused() -> None:
    with pytest.raises(UsageError, match="device = 'gpu' must be one of auto, cpu, cuda"):
        torch_device("gpu")
