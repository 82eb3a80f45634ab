"""Which experts tokens go to while grouped layers are timed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aphroquant.kernels.benchmark.expert_shapes import ExpertShape

_SEED = 7


def draw_experts(shape: ExpertShape, tokens: int, count: int) -> list[Tensor]:
    """`count` times the experts of so many tokens, int64 [T, k].

    Where all pairs together need few of the experts, each draw takes those that were used longest ago, so that no cache
    holds them. Else every token draws its experts at random.
    """
    generator = torch.Generator().manual_seed(_SEED)
    if tokens * shape.top_k <= shape.experts // 2:
        deck = _deck(shape.experts, generator)
        return [
            torch.tensor([[next(deck) for _ in range(shape.top_k)] for _ in range(tokens)], dtype=torch.int64)
            for _ in range(count)
        ]
    return [_random(shape, tokens, generator) for _ in range(count)]


def _random(shape: ExpertShape, tokens: int, generator: torch.Generator) -> Tensor:
    return torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k).indices


def _deck(experts: int, generator: torch.Generator) -> Iterator[int]:
    """All experts in one shuffled order, again and again: any `experts` in a row are all of them."""
    order = torch.randperm(experts, generator=generator).tolist()
    while True:
        yield from order


def num_active(expert_ids: Tensor) -> int:
    """Experts that have a token."""
    return len(set(expert_ids.flatten().tolist()))
