"""Sizes of checkpoints as stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aphroquant.checkpoint import open_checkpoint
from aphroquant.evaluation.size import stored_size

LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", ["weight.absmax", "weight.quant_state.bitsandbytes__nf4", "scales", "codes"])
def test_all_that_a_linear_stores_counts(tiny_checkpoint: Callable[..., Path], name: str) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    before = stored_size(checkpoint)
    added = SimpleNamespace(nbytes=4096)
    larger: Any = SimpleNamespace(
        spec=checkpoint.spec,
        num_bytes=checkpoint.num_bytes + added.nbytes,
        tensors={**checkpoint.tensors, f"{LINEAR}.{name}": added},
    )
    weights = sum(
        checkpoint.tensors[f"{module}.weight"].nbytes // 4
        for module in checkpoint.spec.modules()
        if module.startswith("model.layers.")
    )
    grown = stored_size(larger).linear_bits_per_weight - before.linear_bits_per_weight
    assert grown == pytest.approx(8 * added.nbytes / weights)
