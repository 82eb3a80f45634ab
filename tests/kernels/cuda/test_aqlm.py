"""The AQLM kernels against float64 on the dequantized weight, on a GPU or emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda.aqlm.dequantize import DequantizePlan, dequantize_multiply
from aphroquant.kernels.cuda.aqlm.gather import GatherPlan, gather_multiply
from aphroquant.kernels.cuda.aqlm.lookup import LookupLinear, LookupPlan
from aphroquant.kernels.cuda.aqlm.packing import CodeLayout, pack_additive, pack_codes, unpack_codes
from aphroquant.kernels.cuda.aqlm.sliced import SlicedLinear, SlicedPlan
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import AdditiveScheme, QuantizedWeight

# Relative error in the norm: what rounding the outputs does, and no more.
EXACT = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4}


def look_up(weight: QuantizedWeight, x: Tensor, plan: LookupPlan, device: torch.device, bias: Tensor | None) -> Tensor:
    layer = LookupLinear(pack_additive(weight, x.dtype, device), None if bias is None else bias.to(device), x.dtype)
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=device)
    layer(x.to(device), out, plan)
    return out.cpu()


@pytest.mark.parametrize(
    "scheme", [AdditiveScheme(2, 8), AdditiveScheme(1, 16), AdditiveScheme(3, 5), AdditiveScheme(8, 8, in_group=4),
               AdditiveScheme(1, 20), AdditiveScheme(2, 12, in_group=16)], ids=str
)  # fmt: skip
def test_packed_codes_are_the_codes(scheme: AdditiveScheme) -> None:
    codes = torch.randint(0, 2**scheme.code_bits, (37, 91, scheme.num_codebooks), dtype=torch.int32)
    layout = CodeLayout.of(scheme)
    found = unpack_codes(pack_codes(codes, layout), layout, (37, 91)).int() & (2 ** (8 * layout.code_bytes) - 1)
    assert torch.equal(found, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [AdditiveScheme(2, 8), AdditiveScheme(1, 8), AdditiveScheme(2, 5)], ids=str)
def test_tables_give_the_product(scheme: AdditiveScheme, dtype: torch.dtype, device: torch.device) -> None:
    weight = random_weight(scheme, 83, 1032)
    x, bias = torch.randn(1, 1032).to(dtype), torch.randn(83)
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    found = look_up(weight, x, LookupPlan(2, 4, 4), device, bias)
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < EXACT[dtype], f"{error:.2e}"


ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # with codebooks rounded to the inputs' type


def gather(weight: QuantizedWeight, x: Tensor, plan: GatherPlan, device: torch.device, bias: Tensor | None) -> Tensor:
    packed = pack_additive(weight, x.dtype, device)
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=device)
    tiles = -(-x.shape[0] // 8)
    gather_multiply(packed, x.to(device), None if bias is None else bias.to(device), out, tiles, plan, 2)
    return out.cpu()


GATHERED = {
    "2x8 copies": (AdditiveScheme(2, 8), GatherPlan(4, 1, 8)),
    "1x16 from L2": (AdditiveScheme(1, 16), GatherPlan(4, 1, 0)),
    "1x10 partly shared": (AdditiveScheme(1, 10), GatherPlan(4, 1, 0, 300)),
    "3x5 g4": (AdditiveScheme(3, 5, in_group=4), GatherPlan(2, 1, 2)),
    "8x8 g16": (AdditiveScheme(8, 8, in_group=16), GatherPlan(2, 1, 1)),
    "2x12": (AdditiveScheme(2, 12), GatherPlan(2, 1, 0)),
    "5x4 g4": (AdditiveScheme(5, 4, in_group=4), GatherPlan(2, 1, 0)),
    "1x17": (AdditiveScheme(1, 17), GatherPlan(2, 1, 0)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GATHERED)
def test_gathered_entries_give_the_product(case: str, dtype: torch.dtype, device: torch.device) -> None:
    scheme, plan = GATHERED[case]
    weight = random_weight(scheme, 83, 272)
    x, bias = torch.randn(11, 272).to(dtype), torch.randn(83)
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    found = gather(weight, x, plan, device, bias)
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < ROUNDED[dtype], f"{error:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GATHERED)
def test_dequantized_rows_give_the_product(case: str, dtype: torch.dtype, device: torch.device) -> None:
    weight = random_weight(GATHERED[case][0], 83, 272)
    x, bias = torch.randn(19, 272).to(dtype), torch.randn(83).to(dtype)
    out = torch.full((19, 83), torch.nan, dtype=dtype, device=device)
    packed = pack_additive(weight, dtype, device)
    dequantize_multiply(packed, x.to(device), bias.to(device), out, DequantizePlan(0), 2)
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    error = float((out.cpu().double() - expected).norm() / expected.norm())
    assert error < ROUNDED[dtype], f"{error:.2e}"


SLICED = {
    "1x14": (AdditiveScheme(1, 14), 530, 272),
    "2x13": (AdditiveScheme(2, 13), 70, 136),
    "1x12, two chunks": (AdditiveScheme(1, 12), 20, 8 * 700),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SLICED)
def test_sliced_codebooks_give_the_product(case: str, dtype: torch.dtype, device: torch.device) -> None:
    scheme, n, k = SLICED[case]
    weight = random_weight(scheme, n, k)
    x, bias = torch.randn(1, k).to(dtype), torch.randn(n)
    packed = pack_additive(weight, dtype, device)
    layer = SlicedLinear(packed, weight["codes"].to(device), bias.to(device))
    out = torch.full((1, n), torch.nan, dtype=dtype, device=device)
    layer(x.to(device), out, SlicedPlan(2, 4))
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    error = float((out.cpu().double() - expected).norm() / expected.norm())
    assert error < ROUNDED[dtype], f"{error:.2e}"
