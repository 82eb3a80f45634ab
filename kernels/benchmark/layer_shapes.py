"""The linear layers of well-known models, as an engine runs them: q, k, v in one product, gate and up in another."""

from __future__ import annotations

import re
from typing import NamedTuple

from aphroquant.errors import UsageError
from aphroquant.kernels.benchmark.expert_shapes import EXPERT_MODELS, ExpertShape, expert_shapes


class LayerShape(NamedTuple):
    """A weight [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int


class _Block(NamedTuple):
    """The numbers of a decoder block that decide its layers."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


_BLOCKS = {
    "llama-3-8b": _Block(4096, 32, 8, 128, 14336),
    "llama-3-70b": _Block(8192, 64, 8, 128, 28672),
    "llama-3.2-1b": _Block(2048, 32, 8, 64, 8192),
    "qwen3-8b": _Block(4096, 32, 8, 128, 12288),
    "qwen3-32b": _Block(5120, 64, 8, 128, 25600),
    "mistral-7b": _Block(4096, 32, 8, 128, 14336),
    "smollm2-135m": _Block(576, 9, 3, 64, 1536),
}


def find_shapes(name: str) -> list[LayerShape] | list[ExpertShape]:
    """The expert layers of a mixture of experts, else as layer_shapes."""
    return expert_shapes(name) if name in EXPERT_MODELS else layer_shapes(name)


def layer_shapes(name: str) -> list[LayerShape]:
    """Of a named model, or of one layer written as 4096x14336 (outputs x inputs). UsageError lists the names."""
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        out_features, in_features = int(match[1]), int(match[2])
        if not out_features or not in_features:
            raise UsageError(f"shape {name} must be positive")
        return [LayerShape(name, out_features, in_features)]
    if name not in _BLOCKS:
        raise UsageError(
            f"shapes {name!r} must be one of {', '.join((*_BLOCKS, *EXPERT_MODELS))}, or a layer as OUTPUTSxINPUTS",
            hint="for example --shapes llama-3-8b or --shapes 4096x14336",
        )
    block = _BLOCKS[name]
    queries, keys = block.heads * block.head_dim, block.kv_heads * block.head_dim
    return [
        LayerShape("qkv", queries + 2 * keys, block.hidden),
        LayerShape("o", block.hidden, queries),
        LayerShape("gate_up", 2 * block.intermediate, block.hidden),
        LayerShape("down", block.hidden, block.intermediate),
    ]
