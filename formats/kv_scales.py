"""Scales of a quantized KV cache in a checkpoint, under every name in use: value = stored * scale.

Below the attention module, for {x} = k and v, float of one number or one for each KV head, in any shape:

    {x}_scale             compressed-tensors ([1], or [heads, 1, 1] with strategy attn_head), vLLM
    {x}_proj.{x}_scale    ModelOpt
    {x}_proj.output_scale older compressed-tensors
    attn.{x}_scale, qkv_proj.{x}_scale, {x}_cache.scale, {x}.scale    serving engines' own exports
    kv_scale              deprecated: one for both
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Literal, NamedTuple

from torch import Tensor

from aphroquant.errors import InputError

# The first that is stored counts.
SPELLINGS = (
    "{x}_scale",
    "attn.{x}_scale",
    "{x}_proj.{x}_scale",
    "qkv_proj.{x}_scale",
    "{x}_cache.scale",
    "{x}.scale",
    "{x}_proj.output_scale",
    "kv_scale",
)
WRITTEN = {"modelopt": "{x}_proj.{x}_scale"}  # other formats: the first spelling


class KVScales(NamedTuple):
    """Scales of one layer, float32 [1] or [num_kv_heads]; None where the checkpoint has none."""

    key: Tensor | None
    value: Tensor | None


def kv_scales(attention: str, stored: Container[str], read: Callable[[str], Tensor], num_kv_heads: int) -> KVScales:
    """The scales of the layer whose attention module is `attention` ("model.layers.0.self_attn").

    `stored` are the names of all tensors, `read` gives one of them. InputError naming a scale that is none.
    """
    names = [scale_name(attention, stored, which) for which in ("k", "v")]
    key, value = (None if name is None else _checked(name, read(name), num_kv_heads) for name in names)
    return KVScales(key, value)


def scale_name(attention: str, stored: Container[str], which: Literal["k", "v"]) -> str | None:
    """Under which of its names a scale is stored, if it is."""
    names = (f"{attention}.{spelling.format(x=which)}" for spelling in SPELLINGS)
    return next((name for name in names if name in stored), None)


def written_name(attention: str, which: Literal["k", "v"], format_name: str) -> str:
    """The name under which readers of a format look for a scale."""
    return f"{attention}.{WRITTEN.get(format_name, SPELLINGS[0]).format(x=which)}"


def _checked(name: str, scale: Tensor, num_kv_heads: int) -> Tensor:
    if scale.numel() not in (1, num_kv_heads) or not scale.is_floating_point():
        raise InputError(
            f"{name} is {list(scale.shape)} of {str(scale.dtype).removeprefix('torch.')}, but must be 1 or "
            f"{num_kv_heads} floating-point numbers"
        )
    found = scale.float().flatten()
    if not bool((found > 0).all() and found.isfinite().all()):
        raise InputError(f"{name} = {found.tolist()} must be positive and finite")
    return found
