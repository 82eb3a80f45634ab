"""The decode kernel against float64 on the dequantized weight, on a GPU or emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda.device import obstacle
from aphroquant.kernels.cuda.integer.decode import DecodeLinear
from aphroquant.kernels.cuda.integer.decode_plan import DecodePlan
from aphroquant.kernels.cuda.integer.packing import pack
from aphroquant.schemes import IntegerScheme, QuantizedWeight

# Relative error in the norm: what rounding the outputs does, and no more.
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4}
Shape = tuple[int, int, int | None]


def integer_weight(bits: int, shape: Shape, dtype: torch.dtype = torch.float16, **kind: bool) -> QuantizedWeight:
    n, k, group_size = shape
    scheme = IntegerScheme(bits, group_size, **({"symmetric": False} | kind))
    groups = scheme.num_groups(k)
    tensors = {
        "codes": torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        "scales": (torch.randn(n, groups) * 0.01).to(dtype),
    }
    if scheme.has_offsets:
        tensors["offsets"] = (torch.randn(n, groups) * 0.05).to(dtype)
    elif not scheme.symmetric:
        tensors["zeros"] = torch.randint(0, 2**bits + 1, (n, groups)).clamp(max=255).to(torch.uint8)
    if scheme.act_order:
        tensors["group_index"] = (torch.arange(k) // (group_size or k))[torch.randperm(k)].int()
    return QuantizedWeight(scheme, tensors, (n, k))


def multiply(
    weight: QuantizedWeight, x: Tensor, plan: DecodePlan, device: torch.device, bias: Tensor | None = None
) -> Tensor:
    layer = DecodeLinear(pack(weight, device), bias, x.dtype, lambda shape, token_tiles: plan)
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=device)
    layer(x, out)
    return out


def check(
    weight: QuantizedWeight, dtype: torch.dtype, tokens: int, plan: DecodePlan, device: torch.device, bias: bool = False
) -> None:
    x = torch.randn(tokens, weight.shape[1]).to(dtype)
    addend = torch.randn(weight.shape[0]) if bias else None
    expected = x.double() @ weight.dequantize(torch.float64).T + (0 if addend is None else addend.double())
    found = multiply(weight, x.to(device), plan, device, None if addend is None else addend.to(device)).cpu()
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < TOLERANCE[dtype], f"{error:.2e}"


KINDS = {
    "symmetric": {"symmetric": True},
    "zeros": {},
    "offsets": {"has_offsets": True},
    "act-order": {"act_order": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_kind_of_codes(bits: int, kind: str, device: torch.device) -> None:
    weight = integer_weight(bits, (70, 256, 64), **KINDS[kind])
    dtype = torch.float16 if kind in ("zeros", "act-order") else torch.bfloat16
    check(weight, dtype, 3, DecodePlan(1, 2, 1, 2, 2), device)


@pytest.mark.parametrize(("kind", "dtype"), [("symmetric", torch.float16), ("zeros", torch.bfloat16)])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_the_other_type_of_inputs(bits: int, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    check(integer_weight(bits, (64, 128, 64), **KINDS[kind]), dtype, 3, DecodePlan(1, 1, 1, 2, 2), device)


@pytest.mark.parametrize("group_size", [16, 20, 32, 256, None])
def test_every_size_of_groups(group_size: int | None, device: torch.device) -> None:
    weight = integer_weight(4, (66, 256 if group_size else 300, group_size), torch.bfloat16, symmetric=True)
    check(weight, torch.bfloat16, 9, DecodePlan(1, 1, 2, 2, 2), device, bias=True)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_type_of_scales(scale_dtype: torch.dtype, device: torch.device) -> None:
    check(integer_weight(4, (64, 256, 64), scale_dtype), torch.float16, 1, DecodePlan(1, 1, 1, 2, 2), device)
    check(
        integer_weight(4, (64, 256, None), scale_dtype, symmetric=True),
        torch.float16,
        1,
        DecodePlan(1, 1, 1, 2, 2),
        device,
    )


@pytest.mark.parametrize("shape", [(1, 1, None), (133, 301, 128), (63, 129, 32)])
def test_odd_shapes(shape: Shape, device: torch.device) -> None:
    check(integer_weight(4, shape), torch.bfloat16, 2, DecodePlan(1, 2, 2, 2, 2), device, bias=True)


@pytest.mark.parametrize(
    "plan",
    [
        DecodePlan(1, 1, 2, 2, 2),  # several passes
        DecodePlan(1, 3, 1, 3, 3, unit_chunks=1),
        DecodePlan(1, 5, 1, 1, 2, phases=2),
        DecodePlan(1, 2, 2, 4, 2, phases=2),
        DecodePlan(1, 4, 1, 2, 2, unit_chunks=4, part_tiles=2, idle_clusters=1),
    ],
)
def test_every_way_to_cut_a_layer(plan: DecodePlan, device: torch.device) -> None:
    check(integer_weight(4, (180, 500, 128)), torch.bfloat16, 11, plan, device)


@pytest.mark.parametrize("tokens", [1, 8, 33])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    check(integer_weight(4, (64, 256, 128)), torch.bfloat16, tokens, DecodePlan(1, 1, 1, 2, 2), device)


def test_a_row_that_is_no_number_stays_alone(device: torch.device) -> None:
    weight, plan = integer_weight(4, (64, 256, 128), symmetric=True), DecodePlan(1, 1, 1, 2, 2)
    x = torch.randn(5, 256).bfloat16()
    clean = multiply(weight, x.to(device), plan, device)
    x[1, 3], x[3, 200] = torch.nan, torch.inf
    found = multiply(weight, x.to(device), plan, device)
    assert not found[[1, 3]].isfinite().any()
    assert torch.equal(found[[0, 2, 4]], clean[[0, 2, 4]])


def test_inputs_off_their_alignment_are_copied(device: torch.device) -> None:
    weight, plan = integer_weight(4, (64, 256, 128)), DecodePlan(1, 1, 1, 2, 2)
    memory = torch.randn(3 * 256 + 1).bfloat16().to(device)
    x = memory[1:].view(3, 256)
    assert torch.equal(multiply(weight, x, plan, device), multiply(weight, x.clone(), plan, device))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_inputs_that_come_by_bulk_copies(tokens: int) -> None:
    if reason := obstacle():
        pytest.skip(reason)
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the bulk copy engine needs a Hopper GPU")
    for plan in (DecodePlan(2, 1, 2, 2, 2, 1, early_stages=1), DecodePlan(1, 2, 1, 3, 3, 2)):
        bulk = replace(plan, bulk_input=True)
        for columns in (1024, 1000):  # the others are copied as before
            check(integer_weight(4, (180, columns, 128)), torch.bfloat16, tokens, bulk, torch.device("cuda"))
