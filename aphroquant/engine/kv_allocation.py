"""Which format the keys and the values of each layer are kept in, for so many bytes a token.

The items are a layer's keys and its values, apart: keys have channels that stand out, values not. What a format does to
an item is measured as the error that it makes in the states behind the attention, relative to them; the choice is that
of `aphroquant.calibration.allocation`, as for weights.

The engine keeps one format for all layers so far: `LayerFormats` is what a cache with one a layer would be made of.
Other formats than the engine's take part through `roundings`: a name, and what the cache gives back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.allocation import Option, allocate
from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.activations import chunks, default_memory_limit
from aphroquant.conversion.calibration_block import CalibrationBlock, load_calibration_block
from aphroquant.conversion.source_pass import embedded
from aphroquant.engine.kv_cache import KV_FORMATS, rounded
from aphroquant.errors import UsageError
from aphroquant.models.decoder import Attend, causal_attention
from aphroquant.models.spec import INPUT_NORM, DecoderSpec

Side = Literal["key", "value"]
SIDES: tuple[Side, ...] = ("key", "value")
Rounding = Callable[[Tensor], Tensor]  # [T, num_kv_heads, head_dim] -> the same, as a cache gives it back
Damages = Mapping[tuple[int, Side], Mapping[str, float]]  # of a layer's keys or values, by format


class LayerFormats(NamedTuple):
    """The names of the formats of one layer's keys and values."""

    key: str
    value: str


def cache_roundings(*names: str) -> dict[str, Rounding]:
    """The engine's own formats of these names, with scales of 1 where they are fixed."""
    return {name: partial(rounded, KV_FORMATS[name]) for name in names}


@torch.no_grad()
def kv_damages(checkpoint: Checkpoint, windows: Tensor, roundings: Mapping[str, Rounding]) -> Damages:
    """For each layer's keys and values and each format: the mean over tokens of windows [B, S] of the squared error
    that it alone makes in the states behind the attention, relative to theirs."""
    window_len = windows.shape[1]
    hidden = embedded(checkpoint, windows, memory_limit=default_memory_limit(1))
    found: dict[tuple[int, Side], dict[str, float]] = {}
    for layer in range(checkpoint.spec.num_layers):
        block = load_calibration_block(checkpoint, layer, window_len)
        own = {side: dict.fromkeys(roundings, 0.0) for side in SIDES}
        for rows in chunks(len(hidden), window_len):
            states = hidden.rows[rows]
            x = block.block.norm(INPUT_NORM, states)
            output = block.attention(x)
            size = (states + output).square().sum(1)
            for side in SIDES:
                for name, rounding in roundings.items():
                    error = block.attention(x, _rounding_one(block, side, rounding)) - output
                    own[side][name] += float((error.square().sum(1) / size).sum()) / len(hidden)
            states.copy_(block.forward(states))
        found |= {(layer, side): own[side] for side in SIDES}
    return found


def allocate_kv(
    damages: Damages, bytes_per_head_vector: Mapping[str, int], spec: DecoderSpec, bytes_per_token: int
) -> list[LayerFormats]:
    """The formats of all layers whose errors are the least for at most so many bytes of all layers a token."""
    items = [(layer, side) for layer in range(spec.num_layers) for side in SIDES]
    names = list(bytes_per_head_vector)
    costs = {name: spec.num_kv_heads * size for name, size in bytes_per_head_vector.items()}
    least = min(costs.values()) * len(items)
    if least > bytes_per_token:
        raise UsageError(f"a KV cache of {bytes_per_token} bytes a token is too small: {least} are the least")
    options = [[Option(costs[name], damages[item][name]) for name in names] for item in items]
    chosen = dict(zip(items, (names[place] for place in allocate(options, bytes_per_token)), strict=True))
    return [LayerFormats(chosen[layer, "key"], chosen[layer, "value"]) for layer in range(spec.num_layers)]


def _rounding_one(block: CalibrationBlock, side: Side, rounding: Rounding) -> Attend:
    """Causal attention that reads rounded keys or values."""
    attend = causal_attention(block.block.spec, block.window_len)

    def rounding_attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return attend(q, rounding(k), v, layer) if side == "key" else attend(q, k, rounding(v), layer)

    return rounding_attend
