"""Products of packed weights with many tokens against float64 on the dequantized weight, on a GPU or emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda.integer.batch import gather_columns
from aphroquant.kernels.cuda.integer.mma import MmaTile, mma_multiply
from aphroquant.kernels.cuda.integer.packing import pack_groups, unpack
from aphroquant.kernels.cuda.integer.problem import scale_exponent

# Relative error in the norm: what rounding weights and outputs does, and no more.
TOLERANCE = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


def check_mma(
    shape: tuple[int, int, int],
    tile: MmaTile,
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
    mma_multiply(packed, x, bias, tile, scale_exponent(packed, dtype), out)
    expected = x.cpu().double() @ unpack(packed, torch.float64).cpu().T + bias.cpu().double()
    error = relative_error(out, expected)
    assert error < TOLERANCE[dtype], f"{error:.2e}"


@pytest.mark.parametrize(
    ("bits", "kind"), [(2, "zeros"), (3, "offsets"), (4, "symmetric"), (5, "zeros"), (6, "offsets"), (8, "zeros")]
)
def test_mma_multiplies_every_kind_of_codes(bits: int, kind: str, device: torch.device) -> None:
    check_mma((70, 136, 5), MmaTile(16, stages=3), device, bits=bits, kind=kind)


@pytest.mark.parametrize("group_size", [16, 256, None])
def test_mma_multiplies_every_size_of_groups(group_size: int | None, device: torch.device) -> None:
    check_mma((130, 512, 3), MmaTile(16, stages=2), device, group_size=group_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_takes_scales_that_its_inputs_cannot_hold(dtype: torch.dtype, device: torch.device) -> None:
    check_mma((64, 128, 2), MmaTile(16, stages=2), device, scale_dtype=torch.float32, dtype=dtype, kind="offsets")


def test_mma_splits_columns_and_pads_tokens(device: torch.device) -> None:
    check_mma((72, 320, 33), MmaTile(32, stages=2, split=3), device)


def test_columns_are_gathered_and_padded_with_zeros(device: torch.device) -> None:
    x = torch.randn(3, 7, device=device).to(torch.bfloat16)
    columns = torch.tensor([6, -1, 0, 3, -1, -1, 2, 1], dtype=torch.int32, device=device)
    expected = torch.where(columns >= 0, x[:, columns.clamp(min=0).long()], 0)
    assert torch.equal(gather_columns(x, columns), expected)
