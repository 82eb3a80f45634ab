"""Scales for keys and values are found under every name that checkpoints use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aphroquant.engine.kv_scales import checkpoint_kv_scales
from aphroquant.errors import InputError
from aphroquant.models.spec import DecoderSpec, RopeSpec

SPEC = DecoderSpec(
    "llama", 10, 64, 64, 2, 4, 2, 8, 1e-5, 64, RopeSpec(1e4), True, False, False, False, False, (None,) * 2
)  # fmt: skip
PREFIX = "model.layers.1.self_attn."


def checkpoint(tensors: dict[str, Tensor]) -> Any:
    return SimpleNamespace(source="here", spec=SPEC, tensors=tensors, read=tensors.__getitem__)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"),
        ("k_cache.scale", "v_cache.scale"),
        ("k.scale", "v.scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
def test_every_name_is_read(key: str, value: str) -> None:
    tensors = {PREFIX + key: torch.tensor(0.5), PREFIX + value: torch.tensor([0.25, 2.0], dtype=torch.bfloat16)}
    first, second = checkpoint_kv_scales(checkpoint(tensors))
    assert (first.key.tolist(), first.value.tolist()) == ([1.0, 1.0], [1.0, 1.0])
    assert (second.key.tolist(), second.value.tolist()) == ([0.5, 0.5], [0.25, 2.0])
    assert second.key.is_contiguous()


def test_the_single_old_scale_serves_keys_and_values() -> None:
    second = checkpoint_kv_scales(checkpoint({PREFIX + "kv_scale": torch.tensor([[0.5]])}))[1]
    assert second.key.tolist() == second.value.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("scale", [torch.ones(3), torch.tensor([1.0, 0.0]), torch.tensor(float("nan"))])
def test_an_impossible_scale_is_an_input_error_naming_the_tensor(scale: Tensor) -> None:
    with pytest.raises(InputError, match=r"here: model\.layers\.1\.self_attn\.k_scale"):
        checkpoint_kv_scales(checkpoint({PREFIX + "k_scale": scale}))
