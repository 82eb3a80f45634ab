"""Causal attention of several tokens against float64, on a GPU or emulated."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda.attention.prefill import PagedPrefill, query_tiles
from aphroquant.kernels.cuda.attention.prefill_wgmma import WgmmaTile
from aphroquant.kernels.cuda.device import architecture

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


def reference(queries: Tensor, case: cases.Case, query_lens: list[int], scale: float, window: int | None) -> Tensor:
    """float64 [T, heads, d]."""
    results = []
    rows = queries.cpu().double().split(query_lens)
    for own, keys, values in zip(rows, case.keys, case.values, strict=True):
        group, context = own.shape[1] // keys.shape[0], keys.shape[1]
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        positions = torch.arange(context - own.shape[0], context)[:, None]
        distance = positions - torch.arange(context)[None, :]
        seen = (distance >= 0) & (distance < (window or context + 1))
        scores = (scale * own.transpose(0, 1) @ keys.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        results.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(results)


def run(device: torch.device, shape: cases.AttentionShape, query_lens: list[int], context_lens: list[int],
        dtype: torch.dtype, window: int | None = None, wgmma: WgmmaTile | None = None) -> float:  # fmt: skip
    """The relative error."""
    case = cases.make_case(shape, context_lens, device)
    generator = torch.Generator().manual_seed(sum(query_lens))
    queries = torch.randn(sum(query_lens), shape.num_heads, shape.head_dim, generator=generator).to(device, dtype)
    scale = shape.head_dim**-0.5
    kernel = PagedPrefill(shape, dtype, scale, warps=4, wgmma=wgmma)
    start = torch.tensor([0, *query_lens]).cumsum(0).to(device, torch.int32)
    tiles = kernel.tiles(query_lens, context_lens).to(device)
    output = torch.full_like(queries, torch.nan)
    kernel(queries, output, case.cache, case.tables, case.context_lens, start, tiles, sliding_window=window)
    return cases.relative_error(output, reference(queries, case, query_lens, scale, window))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "kv_format", "dtype"),
    [
        (8, 2, 128, "bfloat16", torch.bfloat16),
        (9, 3, 64, "float16", torch.float16),
        (8, 2, 128, "fp8_e4m3", torch.bfloat16),
        (4, 2, 128, "int8_per_token_head", torch.float16),
        (5, 1, 96, "fp8_e4m3", torch.bfloat16),
        (2, 1, 256, "bfloat16", torch.bfloat16),
    ],
)  # fmt: skip
def test_prefill_attention_agrees_with_float64_for_prompts_and_chunks(
    device: torch.device, heads: int, kv_heads: int, head_dim: int, kv_format: str, dtype: torch.dtype
) -> None:
    shape = cases.shape_of(heads, kv_heads, head_dim, kv_format)
    error = run(device, shape, [40, 1, 17, 3], [40, 70, 150, 3], dtype)
    assert error < cases.TOLERANCE[dtype]


@pytest.mark.parametrize("window", [1, 20, 100])
def test_a_sliding_window_hides_what_is_older(device: torch.device, window: int) -> None:
    shape = cases.shape_of(8, 2, 128, "bfloat16")
    assert run(device, shape, [50, 9], [180, 9], torch.bfloat16, window) < cases.TOLERANCE[torch.bfloat16]


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    """A GPU that has wgmma, or the emulation."""
    if device.type == "cuda" and architecture() != "sm_90a":
        pytest.skip("wgmma needs a Hopper GPU")
    return device


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "kv_format", "dtype", "tile"),
    [
        (8, 2, 128, "bfloat16", torch.bfloat16, WgmmaTile(2, 64, 2)),
        (3, 1, 64, "float16", torch.float16, WgmmaTile(3, 128, 3)),
        (2, 2, 64, "bfloat16", torch.float16, WgmmaTile(1, 32, 2)),
        (4, 1, 128, "fp8_e4m3", torch.bfloat16, WgmmaTile(2, 64, 2)),
        (7, 1, 64, "fp8_e4m3", torch.float16, WgmmaTile(1, 96, 2, 2)),
    ],
)  # fmt: skip
def test_prefill_attention_by_wgmma_agrees_with_float64(
    hopper: torch.device, heads: int, kv_heads: int, head_dim: int, kv_format: str, dtype: torch.dtype, tile: WgmmaTile
) -> None:
    shape = cases.shape_of(heads, kv_heads, head_dim, kv_format)
    assert run(hopper, shape, [40, 1, 17, 3], [40, 70, 150, 3], dtype, wgmma=tile) < cases.TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("window", [1, 20, 100])
def test_a_sliding_window_hides_what_is_older_from_wgmma(hopper: torch.device, window: int) -> None:
    shape = cases.shape_of(4, 1, 64, "bfloat16")
    error = run(hopper, shape, [50, 9], [180, 9], torch.bfloat16, window, WgmmaTile(2, 32, 2))
    assert error < cases.TOLERANCE[torch.bfloat16]


def test_tiles_cover_every_row_once_and_begin_with_the_longest_context() -> None:
    tiles = query_tiles([5, 0, 40], [5, 9, 90], 4, 64).tolist()
    assert sorted(map(tuple, tiles)) == [(0, 0), (2, 0), (2, 64), (2, 128)]
    assert tiles[0] == [2, 128]
    assert tiles[-1] == [0, 0]
    assert query_tiles([], [], 4, 64).shape == (0, 2)
