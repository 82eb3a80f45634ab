"""Decode attention against float64, on a GPU or emulated."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda.attention.decode import (
    MAX_SPLITS,
    DecodeTuning,
    DecodeWorkspace,
    PagedDecode,
    choose_tuning,
    num_splits,
    shared_bytes,
)

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


def run(shape: cases.AttentionShape, case: cases.Case, queries: Tensor, *, splits: int, window: int | None = None,
        tuning: DecodeTuning | None = None) -> Tensor:  # fmt: skip
    scale = shape.head_dim**-0.5
    kernel = PagedDecode(shape, queries.dtype, scale, tuning)
    workspace = DecodeWorkspace(shape, queries.shape[0], queries.shape[0] * splits, queries.device)
    out = kernel(queries, case.cache, case.tables, case.context_lens, workspace, splits=splits, sliding_window=window)
    assert not workspace.counters.any()
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "kv_format", "dtype"),
    [
        (8, 2, 128, "bfloat16", torch.bfloat16),
        (9, 3, 64, "float16", torch.float16),
        (8, 2, 128, "fp8_e4m3", torch.bfloat16),
        (8, 2, 128, "int8_per_token_head", torch.float16),
        (10, 1, 96, "fp8_e4m3", torch.bfloat16),
        (16, 1, 256, "bfloat16", torch.bfloat16),
    ],
)  # fmt: skip
def test_decode_attention_agrees_with_float64_whatever_the_splits(
    device: torch.device, heads: int, kv_heads: int, head_dim: int, kv_format: str, dtype: torch.dtype
) -> None:
    shape = cases.shape_of(heads, kv_heads, head_dim, kv_format)
    case = cases.make_case(shape, [1, 37, 300, 16, 129], device)
    queries = cases.random_queries(shape, 5, dtype, device)
    expected = cases.decode_reference(queries, case, head_dim**-0.5)
    tuning = choose_tuning(shape)
    for splits, min_tokens in ((1, 256), (3, 32), (7, 1)):
        out = run(
            shape,
            case,
            queries,
            splits=splits,
            tuning=DecodeTuning(tuning.warps, tuning.stages, tuning.tiles, min_tokens),
        )
        assert cases.relative_error(out, expected) < cases.TOLERANCE[dtype]


def test_a_sliding_window_hides_what_is_older(device: torch.device) -> None:
    shape = cases.shape_of(8, 2, 128, "bfloat16")
    case = cases.make_case(shape, [5, 300, 77], device, seed=1)
    queries = cases.random_queries(shape, 3, torch.bfloat16, device)
    for window in (1, 20, 64):
        expected = cases.decode_reference(queries, case, 128**-0.5, window)
        out = run(shape, case, queries, splits=2, window=window, tuning=DecodeTuning(min_tokens=16))
        assert cases.relative_error(out, expected) < cases.TOLERANCE[torch.bfloat16]


def test_a_padding_sequence_gives_zeros(device: torch.device) -> None:
    shape = cases.shape_of(8, 2, 128, "bfloat16")
    case = cases.make_case(shape, [0, 20], device)
    out = run(shape, case, cases.random_queries(shape, 2, torch.bfloat16, device), splits=4)
    assert not out[0].any()
    assert torch.isfinite(out[1]).all()


def test_nan_in_one_sequence_stays_there(device: torch.device) -> None:
    shape = cases.shape_of(8, 2, 128, "bfloat16")
    case = cases.make_case(shape, [40, 40], device)
    queries = cases.random_queries(shape, 2, torch.bfloat16, device)
    queries[0, 3, 5] = torch.nan
    out = run(shape, case, queries, splits=1)
    assert torch.isnan(out[0, 3]).all()
    assert torch.isfinite(out[1]).all()


def test_splits_fill_the_gpu_and_no_more() -> None:
    assert num_splits(1, 8, 132) == 16
    assert num_splits(16, 8, 132) == 1
    assert num_splits(32, 8, 132) == 1
    assert num_splits(1000, 8, 132) == 1
    assert num_splits(1, 1, 132) == MAX_SPLITS


@pytest.mark.parametrize("kv_format", ["bfloat16", "float16", "fp8_e4m3", "int8_per_token_head"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_block_fits_into_the_shared_memory_of_every_supported_gpu(kv_format: str, head_dim: int) -> None:
    for group in (1, 4, 16):
        shape = cases.shape_of(group, 1, head_dim, kv_format)
        assert shape.obstacle() is None
        assert shared_bytes(shape, choose_tuning(shape)) <= 99 * 1024 - 1024


def test_shapes_that_the_kernels_cannot_run_are_told_with_a_reason() -> None:
    assert "float32" in str(cases.shape_of(8, 2, 128, "float32").obstacle())
    assert "head_dim 80" in str(cases.shape_of(8, 2, 80, "fp8_e4m3").obstacle())
    assert cases.shape_of(8, 2, 80, "bfloat16").obstacle() is None
    assert "17 query heads" in str(cases.shape_of(17, 1, 128, "bfloat16").obstacle())
