"""Scales for keys and values that a checkpoint brings along, as the cache wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.engine.kv_cache import KVScales
from aphroquant.errors import InputError
from aphroquant.formats.kv_scales import kv_scales

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint


def checkpoint_kv_scales(checkpoint: Checkpoint) -> list[KVScales]:
    """One entry a layer, float32 [num_kv_heads]; 1 where the checkpoint has none."""
    spec = checkpoint.spec
    layers = []
    for layer in range(spec.num_layers):
        attention = f"{spec.block_prefix(layer)}.self_attn"
        try:
            stored = kv_scales(attention, checkpoint.tensors, checkpoint.read, spec.num_kv_heads)
        except InputError as error:
            raise InputError(f"{checkpoint.source}: {error.message}", hint=error.hint) from error
        layers.append(KVScales(_per_head(stored.key, spec.num_kv_heads), _per_head(stored.value, spec.num_kv_heads)))
    return layers


def _per_head(scale: Tensor | None, num_kv_heads: int) -> Tensor:
    return torch.ones(num_kv_heads) if scale is None else scale.expand(num_kv_heads).contiguous()
