"""The shape of attention and of its cache, as macros of the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aphroquant.engine.kv_cache import KVFormat, KVScheme
    from aphroquant.models.spec import DecoderSpec

CACHE_FORMATS = {"bfloat16": 0, "float16": 1, "fp8_e4m3": 2, "int8_per_token_head": 3}  # as in attention_cache.cuh
MAX_GROUP = 16
TILE = 16  # tokens that the kernels take from one page


@dataclass(frozen=True)
class AttentionShape:
    """Heads, channels, and the paged cache with the formats of keys and values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    key: KVFormat
    value: KVFormat

    @classmethod
    def of(cls, spec: DecoderSpec, scheme: KVScheme, block_size: int) -> AttentionShape:
        return cls(spec.num_heads, spec.num_kv_heads, spec.head_dim, block_size, scheme.key, scheme.value)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def obstacle(self) -> str | None:
        """Why the kernels cannot run it, or None."""
        for kv_format in (self.key, self.value):
            if kv_format.name not in CACHE_FORMATS:
                return f"kv_cache_dtype {kv_format.name} is not one of {', '.join(CACHE_FORMATS)}"
            multiple = 32 if kv_format.dtype.itemsize == 1 else TILE
            if self.head_dim % multiple or self.head_dim > 256:
                return (
                    f"head_dim {self.head_dim} is not a multiple of {multiple} up to 256, "
                    f"which {kv_format.name} caches need"
                )
        if self.block_size % TILE:
            return f"block_size {self.block_size} is not a multiple of {TILE}"
        if self.group > MAX_GROUP:
            return f"{self.group} query heads share a KV head, more than {MAX_GROUP}"
        return None

    def cache_macros(self) -> dict[str, int]:
        return {
            "HEAD_DIM": self.head_dim,
            "NUM_KV_HEADS": self.num_kv_heads,
            "BLOCK_SIZE": self.block_size,
            "KEY_FORMAT": CACHE_FORMATS[self.key.name],
            "VALUE_FORMAT": CACHE_FORMATS[self.value.name],
        }

    def macros(self) -> dict[str, int]:
        return {**self.cache_macros(), "GROUP": self.group}

    def vector_bytes(self) -> int:
        """Memory that a kernel reads for one token of one KV head."""
        return self.key.bytes_per_head_vector(self.head_dim) + self.value.bytes_per_head_vector(self.head_dim)


def softmax_scale(scale: float) -> float:
    """The factor for scores whose softmax is taken to base 2."""
    return scale * math.log2(math.e)
