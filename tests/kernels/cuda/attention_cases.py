"""Paged caches with known contents, and attention over them in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.engine.kv_cache import KV_FORMATS, LayerCache
from aphroquant.kernels.cuda.attention.shape import AttentionShape

BLOCK_SIZE = 16
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}


class Case(NamedTuple):
    cache: LayerCache
    tables: Tensor
    context_lens: Tensor
    keys: list[Tensor]  # float64 [kv heads, context, d] of each sequence
    values: list[Tensor]


def shape_of(heads: int, kv_heads: int, head_dim: int, kv_format: str) -> AttentionShape:
    return AttentionShape(heads, kv_heads, head_dim, BLOCK_SIZE, KV_FORMATS[kv_format], KV_FORMATS[kv_format])


def make_case(shape: AttentionShape, context_lens: list[int], device: torch.device, seed: int = 0) -> Case:
    """A cache whose pages lie in random order, with NaN wherever no token of a sequence is."""
    generator = torch.Generator().manual_seed(seed)
    num_pages = [-(-length // BLOCK_SIZE) for length in context_lens]
    num_blocks = sum(num_pages) + 3
    order = torch.randperm(num_blocks, generator=generator, dtype=torch.int32)
    tables = torch.zeros(len(context_lens), max([*num_pages, 1]), dtype=torch.int32)
    vectors = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
    sides = []
    for _ in range(2):
        numbers = torch.randn(vectors, generator=generator)
        if shape.key.scaling == "token_head":
            scales = torch.rand(vectors[:3], generator=generator) * 0.02 + 0.01
            sides.append((((numbers / scales[..., None]).round().clamp(-127, 127)).to(torch.int8), scales))
        elif shape.key.scaling == "head":
            scales = torch.rand(shape.num_kv_heads, generator=generator) + 0.5
            sides.append(((numbers / scales[:, None, None]).to(torch.float8_e4m3fn), scales))
        else:
            sides.append((numbers.to(shape.key.dtype), None))
    used = torch.zeros(vectors[:3], dtype=torch.bool)
    keys, values, first = [], [], 0
    for sequence, (length, pages) in enumerate(zip(context_lens, num_pages, strict=True)):
        blocks = order[first : first + pages].long()
        first += pages
        tables[sequence, :pages] = blocks
        for (codes, scales), out in zip(sides, (keys, values), strict=True):
            exact = codes.double()
            if scales is not None:
                exact = exact * (scales[..., None] if scales.dim() == 3 else scales[:, None, None])
            out.append(exact[blocks].transpose(0, 1).flatten(1, 2)[:, :length])
        for page, block in enumerate(blocks):
            used[block, :, : length - page * BLOCK_SIZE] = True
    poisoned = [_poisoned(codes, scales, used) for codes, scales in sides]
    (key_codes, key_scales), (value_codes, value_scales) = (
        (codes.to(device), None if scales is None else scales.to(device)) for codes, scales in poisoned
    )
    cache = LayerCache(key_codes, value_codes, key_scales, value_scales)
    return Case(cache, tables.to(device), torch.tensor(context_lens, dtype=torch.int32, device=device), keys, values)


def _poisoned(codes: Tensor, scales: Tensor | None, used: Tensor) -> tuple[Tensor, Tensor | None]:
    if scales is not None and scales.dim() == 3:
        return codes, torch.where(used, scales, torch.nan)
    return torch.where(used[..., None], codes.float(), torch.nan).to(codes.dtype), scales


def decode_reference(queries: Tensor, case: Case, scale: float, window: int | None = None) -> Tensor:
    """float64 [S, heads, d]; zeros for sequences without context."""
    results = []
    for query, keys, values in zip(queries.cpu().double(), case.keys, case.values, strict=True):
        group = query.shape[0] // keys.shape[0]
        seen = slice(max(0, keys.shape[1] - window) if window else 0, None)
        keys, values = (side[:, seen].repeat_interleave(group, 0) for side in (keys, values))
        weights = (scale * query[:, None] @ keys.transpose(1, 2)).softmax(-1)
        results.append((weights @ values)[:, 0])
    return torch.stack(results)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.cpu().double() - expected).norm() / expected.norm())


def random_queries(shape: AttentionShape, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, shape.num_heads, shape.head_dim, generator=generator).to(device, dtype)
