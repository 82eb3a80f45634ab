"""Fixtures over `checkpoints.py`, which is no package module: tests are imported by path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from aphroquant.formats.base import Format
from aphroquant.schemes import QuantizedWeight, Scheme

TinyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoints() -> ModuleType:
    path = Path(__file__).parent / "checkpoints.py"
    spec = importlib.util.spec_from_file_location("interop_checkpoints", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # named tuples with postponed annotations look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def round_to_nearest(checkpoints: ModuleType) -> Callable[[torch.Tensor, Scheme], QuantizedWeight]:
    quantizer: Callable[[torch.Tensor, Scheme], QuantizedWeight] = checkpoints.round_to_nearest
    return quantizer


@pytest.fixture(scope="session")
def quantized_checkpoint(
    tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory, checkpoints: ModuleType
) -> Callable[..., Any]:
    """`quantized_checkpoint(format_class, scheme_of, rounded_to=torch.float32)`: a tiny Llama, quantized."""

    def make(target: type[Format], scheme_of: Callable[[str], Scheme], rounded_to: torch.dtype = torch.float32) -> Any:
        source = tiny_checkpoint("llama", hidden_size=128, intermediate_size=256)
        return checkpoints.quantize_checkpoint(
            source, tmp_path_factory.mktemp(target.name), target, scheme_of, rounded_to
        )

    return make
