"""Scales for keys and values that a checkpoint brings along, under every name in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from aphroquant.engine.kv_cache import KVScales
from aphroquant.errors import InputError

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint

# Below self_attn; {x} is k or v. In this order, the first that is stored counts.
_NAMES = (
    "{x}_scale",  # compressed-tensors, vLLM
    "attn.{x}_scale",
    "{x}_proj.{x}_scale",  # ModelOpt
    "qkv_proj.{x}_scale",
    "{x}_cache.scale",
    "{x}.scale",
    "kv_scale",  # deprecated: one for both
)


def checkpoint_kv_scales(checkpoint: Checkpoint) -> list[KVScales]:
    """One entry a layer, float32 [num_kv_heads]; 1 where the checkpoint has none."""
    return [
        KVScales(_scale(checkpoint, layer, "k"), _scale(checkpoint, layer, "v"))
        for layer in range(checkpoint.spec.num_layers)
    ]


def _scale(checkpoint: Checkpoint, layer: int, which: Literal["k", "v"]) -> Tensor:
    num_heads = checkpoint.spec.num_kv_heads
    prefix = f"{checkpoint.spec.block_prefix(layer)}.self_attn."
    name = next((name for part in _NAMES if checkpoint.has(name := prefix + part.format(x=which))), None)
    if name is None:
        return torch.ones(num_heads)
    scale = checkpoint.read(name).float().flatten()
    if scale.numel() not in (1, num_heads):
        raise InputError(f"{checkpoint.source}: {name} has {scale.numel()} values; it must have 1 or {num_heads}")
    if not bool((scale > 0).all() and scale.isfinite().all()):
        raise InputError(f"{checkpoint.source}: {name} must be positive and finite, not {scale.tolist()}")
    return scale.expand(num_heads).contiguous()
