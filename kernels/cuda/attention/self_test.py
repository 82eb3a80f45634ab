"""Attention on the GPU against float64, in milliseconds."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from aphroquant.engine.kv_cache import KV_FORMATS, LayerCache
from aphroquant.kernels.cuda.attention.decode import DecodeWorkspace, PagedDecode
from aphroquant.kernels.cuda.attention.prefill import PagedPrefill
from aphroquant.kernels.cuda.attention.shape import AttentionShape
from aphroquant.kernels.cuda.self_test import SelfTest

_CONTEXT = 300
_BLOCK_SIZE = 16


def _cache(shape: AttentionShape) -> LayerCache:
    """Random numbers in pages of one sequence."""
    vectors = (-(-_CONTEXT // _BLOCK_SIZE), shape.num_kv_heads, _BLOCK_SIZE, shape.head_dim)
    sides: list[Tensor] = []
    scales: list[Tensor | None] = []
    for kv_format in (shape.key, shape.value):
        numbers = torch.randn(vectors, device="cuda")
        if kv_format.scaling == "token_head":
            sides.append((numbers * 40).clamp(-127, 127).to(kv_format.dtype))
            scales.append(torch.rand(vectors[:3], device="cuda") * 0.01 + 0.02)
        else:
            sides.append(numbers.to(kv_format.dtype))
            head = kv_format.scaling == "head"
            scales.append(torch.rand(shape.num_kv_heads, device="cuda") + 0.5 if head else None)
    return LayerCache(sides[0], sides[1], scales[0], scales[1])


def _reference(queries: Tensor, cache: LayerCache, table: Tensor) -> Tensor:
    """float64 [T, heads, d] for queries [T, heads, d] at the context's end."""
    keys, values = (side[:, :_CONTEXT].double() for side in cache.read(table.long()))
    group = queries.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = queries.double().transpose(0, 1) @ keys.transpose(1, 2) * queries.shape[2] ** -0.5
    positions = torch.arange(_CONTEXT - queries.shape[0], _CONTEXT, device="cuda")[:, None]
    hidden = torch.arange(_CONTEXT, device="cuda")[None] > positions
    weights: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ values).transpose(0, 1)


def _error(kv_format: str, num_queries: int) -> float:
    shape = AttentionShape(8, 2, 128, _BLOCK_SIZE, KV_FORMATS[kv_format], KV_FORMATS[kv_format])
    torch.manual_seed(0)
    cache = _cache(shape)
    table = torch.randperm(cache.keys.shape[0], device="cuda").to(torch.int32)[None]
    lens = torch.tensor([_CONTEXT], dtype=torch.int32, device="cuda")
    queries = torch.randn(num_queries, 8, 128, device="cuda", dtype=torch.bfloat16)
    if num_queries == 1:
        workspace = DecodeWorkspace(shape, 1, 2, queries.device)
        out = PagedDecode(shape, queries.dtype, 128**-0.5)(queries, cache, table, lens, workspace, splits=2)
    else:
        kernel, out = PagedPrefill(shape, queries.dtype, 128**-0.5), torch.full_like(queries, torch.nan)
        start = torch.tensor([0, num_queries], dtype=torch.int32, device="cuda")
        kernel(queries, out, cache, table, lens, start, kernel.tiles([num_queries], [_CONTEXT]).cuda())
    expected = _reference(queries, cache, table[0])
    return float((out.double() - expected).norm() / expected.norm())


SELF_TESTS = tuple(
    SelfTest(f"attention: {name}, {kv_format} cache", partial(_error, kv_format, num_queries), 6e-3)
    for kv_format in ("bfloat16", "float16", "fp8_e4m3", "int8_per_token_head")
    for name, num_queries in (("one token", 1), ("40 tokens", 40))
)
