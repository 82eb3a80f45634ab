"""The paged KV cache: its number formats (KVScheme), its memory, storing into it and reading back.

One seam for every way of keeping keys and values: `value = stored * scale`, with a scale that is 1, one a head, or one
a head vector. Keys and values have a format each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.models.spec import DecoderSpec

Scaling = Literal["none", "head", "token_head"]

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


@dataclass(frozen=True)
class KVFormat:
    """How keys or values are kept. `scaling`: none, one scale a head (fixed), or one for each head vector."""

    name: str
    dtype: torch.dtype
    scaling: Scaling = "none"

    def bytes_per_head_vector(self, head_dim: int) -> int:
        """Memory for one head of one token, its scale included."""
        return head_dim * self.dtype.itemsize + (4 if self.scaling == "token_head" else 0)


KV_FORMATS: Mapping[str, KVFormat] = {
    "float32": KVFormat("float32", torch.float32),
    "bfloat16": KVFormat("bfloat16", torch.bfloat16),
    "float16": KVFormat("float16", torch.float16),
    "fp8_e4m3": KVFormat("fp8_e4m3", torch.float8_e4m3fn, "head"),
    "int8_per_token_head": KVFormat("int8_per_token_head", torch.int8, "token_head"),
}


@dataclass(frozen=True)
class KVScheme:
    """The formats of keys and of values."""

    key: KVFormat
    value: KVFormat

    @classmethod
    def named(cls, name: str) -> KVScheme:
        """Keys and values both in the format `name`. Raises UsageError listing the known names."""
        if name not in KV_FORMATS:
            raise UsageError(f"kv_cache_dtype = {name!r} must be one of auto, {', '.join(KV_FORMATS)}")
        return cls(KV_FORMATS[name], KV_FORMATS[name])

    def bytes_per_block(self, spec: DecoderSpec, block_size: int) -> int:
        """Memory of one block in all layers."""
        vectors = spec.num_layers * spec.num_kv_heads * block_size
        formats = (self.key, self.value)
        return vectors * sum(kv_format.bytes_per_head_vector(spec.head_dim) for kv_format in formats)

    def __str__(self) -> str:
        return self.key.name if self.key == self.value else f"{self.key.name}/{self.value.name}"


class KVScales(NamedTuple):
    """Fixed scales of one layer for formats that scale by head: float32 [num_kv_heads] each."""

    key: Tensor
    value: Tensor


class LayerCache(NamedTuple):
    """One layer's memory. Scales are as in KVCache."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks, float32 [num_kv_heads, len(blocks) * block_size, head_dim]."""
        return _decode(self.keys, self.key_scales, blocks), _decode(self.values, self.value_scales, blocks)


class KVCache:
    """Keys and values of all layers, in blocks of `block_size` tokens.

    Memory, shared with compiled code (base addresses are multiples of 64 bytes, rows are dense):
        keys, values              a list with one tensor a layer: [num_blocks, num_kv_heads, block_size, head_dim]
        key_scales, value_scales  likewise; scaling "token_head": float32 [num_blocks, num_kv_heads, block_size];
                                  "head": float32 [num_kv_heads]; "none": None
    Encoding: float formats round to nearest even; fp8_e4m3 saturates at 448 after division by its scale (NaN stays);
    int8_per_token_head has scale = absmax / 127 of the head vector (1 if that is 0), codes rounded half to even.
    Memory is zero at first and is not committed before it is written.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        scheme: KVScheme,
        num_blocks: int,
        block_size: int,
        scales: Sequence[KVScales] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`scales`: one entry a layer for formats that scale by head; without it their scales are 1.

        On a GPU (`device`) all memory is taken at once.
        """
        self.spec, self.scheme = spec, scheme
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        layers = range(spec.num_layers)
        self.keys = [_zeros(shape, scheme.key.dtype, device) for _ in layers]
        self.values = [_zeros(shape, scheme.value.dtype, device) for _ in layers]
        fixed = scales or [KVScales(torch.ones(spec.num_kv_heads), torch.ones(spec.num_kv_heads)) for _ in layers]
        self.key_scales = [_scales(scheme.key, shape, fixed[layer].key, device) for layer in layers]
        self.value_scales = [_scales(scheme.value, shape, fixed[layer].value, device) for layer in layers]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.scheme.bytes_per_block(self.spec, self.block_size)

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def layer(self, layer: int) -> LayerCache:
        return LayerCache(self.keys[layer], self.values[layer], self.key_scales[layer], self.value_scales[layer])

    def store(self, layer: int, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v, float [T, num_kv_heads, head_dim], into the slots (block * block_size + offset) [T]."""
        blocks, offsets = slot_mapping // self.block_size, slot_mapping % self.block_size
        _encode(self.scheme.key, k, self.keys[layer], self.key_scales[layer], blocks, offsets)
        _encode(self.scheme.value, v, self.values[layer], self.value_scales[layer], blocks, offsets)


def rounded(kv_format: KVFormat, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """What a cache of this format gives back for keys or values x [T, num_kv_heads, head_dim], float32.

    `scale` [num_kv_heads] is that of formats that scale by head; left out it is 1."""
    num_tokens, num_heads, head_dim = x.shape
    shape = (1, num_heads, num_tokens, head_dim)
    memory = _zeros(shape, kv_format.dtype, x.device)
    scales = _scales(kv_format, shape, torch.ones(num_heads) if scale is None else scale, x.device)
    blocks, offsets = torch.zeros(num_tokens, dtype=torch.int64), torch.arange(num_tokens)
    _encode(kv_format, x, memory, scales, blocks.to(x.device), offsets.to(x.device))
    return _decode(memory, scales, torch.zeros(1, dtype=torch.int64, device=x.device)).transpose(0, 1)


def _encode(
    kv_format: KVFormat, x: Tensor, memory: Tensor, scales: Tensor | None, blocks: Tensor, offsets: Tensor
) -> None:
    x = x.float()
    if kv_format.scaling == "head":
        assert scales is not None
        codes = (x / scales[None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(kv_format.dtype)
        memory.view(torch.uint8)[blocks, :, offsets] = codes.view(torch.uint8)
    elif kv_format.scaling == "token_head":
        assert scales is not None
        absmax = x.abs().amax(-1)  # [T, heads]
        scale = torch.where(absmax == 0, 1.0, absmax / 127)
        scales[blocks, :, offsets] = scale
        memory[blocks, :, offsets] = (x / scale[..., None]).round().to(kv_format.dtype)
    else:
        memory[blocks, :, offsets] = x.to(kv_format.dtype)


def _decode(memory: Tensor, scales: Tensor | None, blocks: Tensor) -> Tensor:
    if memory.dtype == torch.float8_e4m3fn:  # not every indexing kernel knows float8
        stored = memory.view(torch.uint8)[blocks].view(torch.float8_e4m3fn).float()
    else:
        stored = memory[blocks].float()  # [n, heads, block_size, head_dim]
    if scales is not None:
        stored = stored * (scales[None, :, None, None] if scales.dim() == 1 else scales[blocks][..., None])
    return stored.transpose(0, 1).flatten(1, 2)


def _scales(
    kv_format: KVFormat, shape: tuple[int, int, int, int], fixed: Tensor, device: torch.device | None
) -> Tensor | None:
    if kv_format.scaling == "none":
        return None
    if kv_format.scaling == "token_head":
        return _zeros(shape[:3], torch.float32, device)
    return fixed.float().contiguous().to(device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Aligned zeros. numpy's come from calloc: unlike torch's, pages are committed when they are first written."""
    if device is not None and device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)
