"""A text long enough for a few windows, and copies of checkpoints with changed weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"The model number {i} answers {i * i} questions in {i % 7} ways." for i in range(120)))
    return path


@pytest.fixture
def changed_copy(tmp_path: Path) -> Callable[..., Path]:
    """`changed_copy(directory, change)`: a copy whose dict of tensors `change` has edited in place."""

    def copy(directory: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = "changed") -> Path:
        path = tmp_path / name
        shutil.copytree(directory, path)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return copy


@pytest.fixture
def noisy_copy(changed_copy: Callable[..., Path]) -> Callable[..., Path]:
    """`noisy_copy(directory, noise)`: every matrix disturbed by `noise` times its standard deviation."""

    def copy(directory: Path, noise: float) -> Path:
        def disturb(tensors: dict[str, torch.Tensor]) -> None:
            for name, tensor in tensors.items():
                if tensor.ndim == 2:
                    tensors[name] = tensor + noise * tensor.std() * torch.randn_like(tensor)

        return changed_copy(directory, disturb, name=f"noise-{noise}")

    return copy
