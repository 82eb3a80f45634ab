"""The wgmma kernel for packed weights against float64 on the dequantized weight, on a Hopper GPU or emulated."""

from __future__ import annotations

import pytest
import torch

from aphroquant.kernels.cuda.integer.packing import pack_groups, unpack
from aphroquant.kernels.cuda.integer.problem import scale_exponent
from aphroquant.kernels.cuda.integer.row_parts import multiply_parts, row_parts
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile, wgmma_multiply

# Relative error in the norm: what rounding weights and outputs does, and no more.
TOLERANCE = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4}


def check(
    shape: tuple[int, int, int],
    tile: WgmmaTile,
    device: torch.device,
    *,
    bits: int = 4,
    group_size: int | None = 64,
    kind: str = "symmetric",
    scale_dtype: torch.dtype = torch.bfloat16,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    rows, columns, tokens = shape
    groups = 1 if group_size is None else -(-columns // group_size)
    packed = pack_groups(
        bits,
        torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device),
        (torch.randn(rows, groups, device=device) * 0.01).to(scale_dtype),
        group_size,
        zeros=torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, device=device) if kind == "zeros" else None,
        offsets=(torch.randn(rows, groups, device=device) * 0.05).to(scale_dtype) if kind == "offsets" else None,
    )
    x = torch.randn(tokens, columns, device=device).to(dtype)
    bias = torch.randn(rows, device=device)
    out = torch.full((tokens, rows), torch.nan, dtype=dtype, device=device)
    wgmma_multiply(packed, x, bias, tile, scale_exponent(packed, dtype), out, multiprocessors=3)
    expected = x.cpu().double() @ unpack(packed, torch.float64).cpu().T + bias.cpu().double()
    error = float((out.cpu().double() - expected).norm() / expected.norm())
    assert error < TOLERANCE[dtype], f"{error:.2e}"


def test_one_tile(device: torch.device) -> None:
    check((128, 256, 16), WgmmaTile(16, stages=2), device)


def test_odd_rows_tokens_and_columns(device: torch.device) -> None:
    check((203, 328, 19), WgmmaTile(16, warpgroups=1, tiles=2, stages=2, steps=2), device, group_size=32, kind="zeros")


def test_blocks_take_tile_after_tile(device: torch.device) -> None:
    check((130, 200, 40), WgmmaTile(16, warpgroups=1, chunks=1, stages=3, persistent=True), device, group_size=None)


def test_one_warpgroup_stores_while_the_other_multiplies(device: torch.device) -> None:
    check((260, 200, 40), WgmmaTile(16, chunks=1, stages=3, persistent=True, lead=2), device)
    check((128, 64, 16), WgmmaTile(16, chunks=1, stages=3, persistent=True, lead=2), device)  # one step a tile


@pytest.mark.parametrize("group_size", [64, 128, 256])
@pytest.mark.parametrize(
    ("kind", "scale_dtype", "dtype"),
    [("zeros", torch.float16, torch.bfloat16), ("symmetric", torch.float32, torch.float16)],
)
def test_scales_of_large_groups_are_exact(
    group_size: int, kind: str, scale_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    tile = WgmmaTile(16, stages=2, chunks=1 if kind == "zeros" else 2, steps=2)
    check((75, 512, 3), tile, device, group_size=group_size, kind=kind, scale_dtype=scale_dtype, dtype=dtype)


def test_offsets_and_small_groups_scale_the_codes(device: torch.device) -> None:
    check((64, 256, 5), WgmmaTile(16, warpgroups=1, stages=2), device, kind="offsets", scale_dtype=torch.float16)
    check((64, 256, 5), WgmmaTile(16, warpgroups=1, stages=2), device, group_size=16)


def test_a_part_of_the_rows_leaves_the_others_alone(device: torch.device) -> None:
    packed = pack_groups(
        4,
        torch.randint(0, 16, (300, 128), dtype=torch.uint8, device=device),
        torch.rand(300, 1, device=device).to(torch.bfloat16),
        128,
    )
    x = torch.randn(16, 128, device=device).to(torch.bfloat16)
    expected = x.cpu().double() @ unpack(packed, torch.float64).cpu().T
    for rows, tile in ((range(128), WgmmaTile(16, stages=2)), (range(128, 300), WgmmaTile(16, warpgroups=1, stages=2))):
        out = torch.full((16, 300), torch.nan, dtype=torch.bfloat16, device=device)
        wgmma_multiply(packed, x, None, tile, out=out, rows=rows)
        found = out.cpu().double()[:, rows.start : rows.stop]
        error = (found - expected[:, rows.start : rows.stop]).norm() / expected[:, rows.start : rows.stop].norm()
        assert error < TOLERANCE[torch.bfloat16]
        assert int(out.isnan().sum()) == 16 * (300 - len(rows))


@pytest.mark.parametrize(("rows", "tokens"), [(51200, 256), (57344, 256), (6144, 1024), (51211, 256)])
@pytest.mark.parametrize("multicast", [1, 2])
def test_rows_are_cut_where_the_gpu_is_full(rows: int, tokens: int, multicast: int) -> None:
    tile = WgmmaTile(256, chunks=1, persistent=True, multicast=multicast, cut=True)
    (first, kept), (rest, small) = row_parts(rows, 4096, tokens, tile, 132)
    assert kept == tile
    assert (first.start, first.stop, rest.stop) == (0, rest.start, rows)
    assert first.stop % (tile.rows * multicast) == 0 == rest.start % small.rows
    rounds = len(first) // tile.rows * (tokens // 256) / 132
    assert 0.96 * round(rounds) <= rounds <= round(rounds)
    assert -(-len(rest) // small.rows) * (tokens // small.tokens) * small.split <= 132


@pytest.mark.parametrize(("rows", "tokens"), [(4096, 256), (128, 32), (132 * 128, 256)])
def test_rows_that_do_not_fill_the_gpu_or_fill_it_evenly_are_not_cut(rows: int, tokens: int) -> None:
    tile = WgmmaTile(256, chunks=1, persistent=True, cut=True)
    assert row_parts(rows, 4096, tokens, tile, 132) == [(range(rows), tile)]


def test_a_product_in_two_launches_is_the_whole_product(device: torch.device) -> None:
    codes = torch.randint(0, 16, (400, 128), dtype=torch.uint8, device=device)
    packed = pack_groups(4, codes, torch.rand(400, 1, device=device).to(torch.bfloat16), 128)
    x = torch.randn(16, 128, device=device).to(torch.bfloat16)
    parts = row_parts(400, 128, 16, WgmmaTile(16, chunks=1, stages=2, persistent=True, cut=True), 2)
    assert [rows for rows, _ in parts] == [range(256), range(256, 400)]
    out = torch.full((16, 400), torch.nan, dtype=torch.bfloat16, device=device)
    multiply_parts(packed, x, None, parts, out=out, multiprocessors=2)
    expected = x.cpu().double() @ unpack(packed, torch.float64).cpu().T
    assert (out.cpu().double() - expected).norm() / expected.norm() < TOLERANCE[torch.bfloat16]
