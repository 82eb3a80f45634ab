"""Scales of a quantized KV cache on their way to the target: its config must say that they are there."""

from __future__ import annotations

from typing import Any

from aphroquant.checkpoint import Checkpoint
from aphroquant.formats.kv_scales import written_name

KV_SCHEME = "kv_cache_scheme"
# What scales without a description are for: all formats that store them have them for FP8 caches.
_FP8_PER_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def with_kv_scheme(quantization_config: dict[str, Any], checkpoint: Checkpoint, target: str) -> dict[str, Any]:
    """The target's config, with a description of the cache's scales if it has a place for one and all are stored."""
    if KV_SCHEME not in quantization_config or not _has_all_scales(checkpoint, target):
        return quantization_config
    described = (checkpoint.quantization_config or {}).get(KV_SCHEME)
    return {**quantization_config, KV_SCHEME: described or _FP8_PER_TENSOR}


def _has_all_scales(checkpoint: Checkpoint, target: str) -> bool:
    keys = [module for module in checkpoint.schemes() if module.endswith(".k_proj")]
    attentions = [module.rpartition(".")[0] for module in keys]
    scales = [written_name(attention, which, target) for attention in attentions for which in ("k", "v")]
    return bool(scales) and all(map(checkpoint.has, scales))
