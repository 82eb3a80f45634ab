"""Weights of tables and block scales are what the formula says, judged in float64 by scalar loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.schemes import TABLES, ActivationScheme, LookupScheme, QuantizedWeight

NVFP4 = LookupScheme("e2m1", 16, "e4m3")
MXFP4 = LookupScheme("e2m1", 32, "e8m0")
NF4 = LookupScheme("nf4", 64, "float", flattened=True)
NF4_NESTED = LookupScheme("nf4", 16, "nested", flattened=True)
SCHEMES = [NVFP4, MXFP4, NF4, NF4_NESTED, LookupScheme("fp4", 8, "float")]


def weight_of(scheme: LookupScheme, n: int, k: int) -> QuantizedWeight:
    shapes = scheme.shapes(n, k)
    tensors = {"codes": torch.randint(0, 16, (n, k), dtype=torch.uint8)}
    match scheme.scales:
        case "float":
            tensors["scales"] = torch.rand(shapes["scales"])
        case "e8m0":
            exponents = torch.randint(100, 150, shapes["scales"], dtype=torch.uint8)
            tensors["scales"] = exponents.view(torch.float8_e8m0fnu)
        case "e4m3":
            tensors["scales"] = torch.rand(shapes["scales"]).mul(448).to(torch.float8_e4m3fn)
            tensors["global_scale"] = torch.tensor(1 / 1234.5, dtype=torch.float64)
        case "nested":
            tensors["scales"] = torch.randint(0, 256, shapes["scales"], dtype=torch.uint8)
            tensors["nested_table"] = torch.randn(256)
            tensors["nested_scales"] = torch.rand(shapes["nested_scales"])
            tensors["nested_offset"] = torch.tensor(0.25)
    return QuantizedWeight(scheme, tensors, (n, k))


def block_scale(weight: QuantizedWeight, block: int) -> float:
    """The scale of one block, counted over all of them."""
    assert isinstance(weight.scheme, LookupScheme)
    stored = weight["scales"].flatten()[block]
    match weight.scheme.scales:
        case "float":
            return float(stored)
        case "e8m0":
            return 2.0 ** (int(weight["scales"].view(torch.uint8).flatten()[block]) - 127)
        case "e4m3":
            return float(stored) * float(weight["global_scale"])
        case "nested":
            factor = float(weight["nested_scales"][block // 256])
            return float(weight["nested_table"][int(stored)]) * factor + 0.25


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(3, 128), (5, 33), (1, 1)], ids=str)
def test_every_element_follows_the_formula(scheme: LookupScheme, shape: tuple[int, int]) -> None:
    weight = weight_of(scheme, *shape)
    weight.check("layer")
    dequantized = weight.dequantize(torch.float64)
    blocks_a_row = math.ceil(shape[1] / scheme.block_size)
    table = scheme.table_values(torch.float64).tolist()
    for row in range(shape[0]):
        for column in range(shape[1]):
            flat = row * shape[1] + column
            in_row = row * blocks_a_row + column // scheme.block_size
            block = flat // scheme.block_size if scheme.flattened else in_row
            expected = table[int(weight["codes"][row, column])] * block_scale(weight, block)
            assert float(dequantized[row, column]) == pytest.approx(expected, rel=1e-15)


def test_e2m1_is_sign_two_bits_of_exponent_one_of_mantissa() -> None:
    for code, value in enumerate(TABLES["e2m1"]):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        assert value == (-magnitude if sign else magnitude)


def test_all_exponent_bytes_are_powers_of_two_and_the_last_is_no_number() -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)[:, None]
    weight = QuantizedWeight(
        LookupScheme("e2m1", 32, "e8m0"),
        {"codes": torch.full((256, 1), 2, dtype=torch.uint8), "scales": scales},
        (256, 1),
    )
    for dtype in (torch.float32, torch.float64):
        values = weight.dequantize(dtype).flatten().tolist()
        assert values[:255] == [2.0 ** (byte - 127) for byte in range(255)]
        assert math.isnan(values[255])


@pytest.mark.parametrize("divisor", [1234.5, 0.3, 7.0, 448 * 6 / 0.0123, 2.0**100 / 3])
def test_a_global_scale_is_precise_enough_to_multiply_as_its_reciprocal_divides(divisor: float) -> None:
    stored = torch.tensor(divisor, dtype=torch.float32)
    local = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]  # every non-negative e4m3 number
    tensors = {"scales": local, "global_scale": 1 / stored.double()}
    assert torch.equal(NVFP4.block_scales(tensors), local.float() / stored)


def changed(weight: QuantizedWeight, **tensors: Tensor) -> QuantizedWeight:
    return QuantizedWeight(weight.scheme, {**weight.tensors, **tensors}, weight.shape)


def test_a_global_scale_may_differ_by_its_rounding_and_nothing_else() -> None:
    weight = weight_of(NVFP4, 4, 64)
    scale = weight["global_scale"]
    assert weight.same_values(weight)
    assert weight.same_values(changed(weight, global_scale=scale.float().double()))
    assert weight.same_values(changed(weight, global_scale=1 / (1 / scale).float().double()))
    assert not weight.same_values(changed(weight, global_scale=scale * (1 + 2**-22)))
    assert not weight.same_values(changed(weight, codes=weight["codes"] ^ 8))
    assert not weight.same_values(changed(weight, scales=weight["scales"].flip(0)))
    assert not weight.same_values(weight_of(NVFP4, 4, 32))


def test_other_weights_have_the_same_values_if_every_bit_is_the_same() -> None:
    weight = weight_of(MXFP4, 4, 64)
    assert weight.same_values(QuantizedWeight.dense(weight.dequantize()))
    assert not weight.same_values(QuantizedWeight.dense(weight.dequantize() * (1 + 2**-22)))
    assert weight.same_values(changed(weight, scales=weight["scales"].clone()))
    zeros = changed(weight, codes=torch.zeros_like(weight["codes"]))
    assert not zeros.same_values(changed(weight, codes=torch.full_like(weight["codes"], 8)))  # -0


def test_num_bits_counts_every_number_at_the_width_it_is_stored_with() -> None:
    codes = 4 * 64 * 4
    assert weight_of(NVFP4, 4, 64).num_bits == codes + 16 * 8 + 32
    assert weight_of(MXFP4, 4, 64).num_bits == codes + 8 * 8
    assert weight_of(NF4, 4, 64).num_bits == codes + 4 * 32
    assert weight_of(NF4_NESTED, 4, 64).num_bits == codes + 16 * 8 + 256 * 32 + 32 + 32


def test_only_global_or_static_input_scales_are_asked_of_the_checkpoint() -> None:
    fp4_inputs = ActivationScheme("float", 4, granularity="group", group_size=16)
    assert LookupScheme("e2m1", 16, "e4m3", activations=fp4_inputs).has_input_scale
    assert not LookupScheme("e2m1", 32, "e8m0", activations=fp4_inputs).has_input_scale
    assert not LookupScheme("e2m1", 16, "e4m3", activations=ActivationScheme("float")).has_input_scale
    assert not NVFP4.has_input_scale
    static = ActivationScheme("float", dynamic=False, granularity="tensor")
    assert LookupScheme("e2m1", 32, "e8m0", activations=static).has_input_scale


def test_scales_of_another_dtype_are_refused() -> None:
    """A byte read as a number instead of an exponent would be silently wrong."""
    weight = weight_of(MXFP4, 2, 32)
    tensors: dict[str, Tensor] = {**weight.tensors, "scales": weight["scales"].view(torch.uint8)}
    with pytest.raises(InputError, match=r"layer: scales is torch.uint8, but e2m1 g32 e8m0 needs torch.float8_e8m0fnu"):
        QuantizedWeight(MXFP4, tensors, weight.shape).check("layer")


def test_contradicting_schemes_are_refused() -> None:
    with pytest.raises(UsageError, match="block_size = 0"):
        LookupScheme("nf4", 0, "float")
    with pytest.raises(UsageError, match="flattened"):
        LookupScheme("nf4", 64, "nested")


def test_schemes_read_well() -> None:
    assert [str(scheme) for scheme in SCHEMES] == [
        "e2m1 g16 e4m3",
        "e2m1 g32 e8m0",
        "nf4 g64 flat",
        "nf4 g16 double-quantized flat",
        "fp4 g8",
    ]
