"""Formats of keys and values by layer: damages as measured, and the best choice within the bytes of a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aphroquant.checkpoint import open_checkpoint
from aphroquant.engine.kv_allocation import SIDES, allocate_kv, cache_roundings, kv_damages
from aphroquant.engine.kv_cache import KV_FORMATS, KVCache, KVScheme, rounded
from aphroquant.errors import UsageError

Tiny = Callable[..., Path]
SIZES = {"float16": 32, "int8_per_token_head": 20, "four_bits": 12}


def four_bits(x: Tensor) -> Tensor:
    """A format that the engine has not: 4 bits for each head vector."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 7
    return (x / scale).round() * scale


@pytest.mark.parametrize("name", KV_FORMATS)
def test_rounding_is_what_a_cache_gives_back(tiny_checkpoint: Tiny, name: str) -> None:
    spec = open_checkpoint(tiny_checkpoint("llama")).spec
    x = torch.randn(32, spec.num_kv_heads, spec.head_dim)
    cache = KVCache(spec, KVScheme.named(name), 2, 16)
    cache.store(0, torch.arange(32), x, x)
    keys, _ = cache.layer(0).read(torch.arange(2))
    assert torch.equal(rounded(KV_FORMATS[name], x), keys.transpose(0, 1))


def test_damages_fall_with_bits_and_what_is_exact_does_none(tiny_checkpoint: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("qwen3"))
    windows = torch.randint(0, 300, (4, 32))
    roundings = cache_roundings("float32", "float16", "int8_per_token_head") | {"four_bits": four_bits}
    damages = kv_damages(checkpoint, windows, roundings)
    assert set(damages) == {(layer, side) for layer in range(checkpoint.spec.num_layers) for side in SIDES}
    for own in damages.values():
        assert own["float32"] == 0
        assert 0 < own["float16"] < own["int8_per_token_head"] < own["four_bits"] < 1


def test_bytes_go_where_the_error_is(tiny_checkpoint: Tiny) -> None:
    spec = open_checkpoint(tiny_checkpoint("llama")).spec
    damages = {
        (layer, side): {
            "float16": 0.0,
            "int8_per_token_head": 0.01,
            "four_bits": 5.0 if (layer, side) == (1, "key") else 0.1,
        }
        for layer in range(spec.num_layers)
        for side in SIDES
    }
    cheapest = 2 * spec.num_layers * spec.num_kv_heads * 12
    assert {tuple(own) for own in allocate_kv(damages, SIZES, spec, cheapest)} == {("four_bits", "four_bits")}
    found = allocate_kv(damages, SIZES, spec, cheapest + spec.num_kv_heads * 8)
    assert found[1].key == "int8_per_token_head"
    assert [found[0].key, found[0].value, found[1].value] == ["four_bits"] * 3
    with pytest.raises(UsageError, match="is too small"):
        allocate_kv(damages, SIZES, spec, cheapest - 1)
