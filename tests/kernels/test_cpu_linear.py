"""Compiled integer layers equal float64 arithmetic, for any shape, grouping, and instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cpu.linear import CpuLinear
from aphroquant.schemes import IntegerScheme, QuantizedWeight

# Relative error, in the norm of the result.
FLOAT_TOLERANCE = 2e-6  # float32 accumulation
EMULATION_TOLERANCE = 2e-6  # integer dot products are exact; scaling and adding chunks is float32
INT8_TOLERANCE = 2e-2  # what rounding a normal input to 8 bits does

SHAPES = [
    (33, 64, 64),
    (17, 70, 32),
    (48, 96, 48),
    (16, 100, None),
    (5, 36, 12),
    (64, 130, 13),
    (7, 5, 2),
    (96, 192, 64),
]
VARIANTS = {
    "asymmetric": {},
    "symmetric": {"symmetric": True},
    "real offsets": {"has_offsets": True},
    "act-order": {"act_order": True},
}


def integer_weight(
    bits: int, shape: tuple[int, int, int | None], *, dtype: torch.dtype = torch.float16, **kind: bool
) -> QuantizedWeight:
    n, k, group_size = shape
    scheme = IntegerScheme(bits, group_size, **({"symmetric": False} | kind))
    groups = scheme.num_groups(k)
    tensors = {
        "codes": torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        "scales": (torch.rand(n, groups) * 0.01 + 0.001).to(dtype),
    }
    if scheme.has_offsets:
        tensors["offsets"] = (torch.randn(n, groups) * 0.05).to(dtype)
    elif not scheme.symmetric:
        tensors["zeros"] = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
    if scheme.act_order:
        tensors["group_index"] = (torch.arange(k) // (group_size or k))[torch.randperm(k)].int()
    return QuantizedWeight(scheme, tensors, (n, k))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def rounded_to_int8(x: Tensor, weight: QuantizedWeight, chunk_len: int) -> Tensor:
    """x as the fast mode sees it: one scale for each chunk of a group's columns, in float64."""
    rounded = torch.empty_like(x, dtype=torch.float64)
    for group in weight.group_index().unique():
        columns = torch.nonzero(weight.group_index() == group).flatten()
        for chunk in columns.split(chunk_len):
            scale = x[:, chunk].abs().amax(1, keepdim=True) / 127
            codes = (x[:, chunk] / torch.where(scale == 0, 1.0, scale)).round()
            rounded[:, chunk] = codes.double() * scale.double()
    return rounded


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_results_equal_float64_arithmetic(instruction_set: str, bits: int, variant: str) -> None:
    for shape in SHAPES:
        weight = integer_weight(bits, shape, **VARIANTS[variant])
        x, bias = torch.randn(9, shape[1]), torch.randn(shape[0])
        matrix = weight.dequantize(torch.float64)
        exact = CpuLinear(weight, bias, activations="float")
        error = relative_error(exact(x), x.double() @ matrix.T + bias)
        assert error < FLOAT_TOLERANCE, f"float {shape}: {error}"

        fast = CpuLinear(weight, None, activations="int8")
        rounded = rounded_to_int8(x, weight, fast.chunk_len)
        error = relative_error(fast(x), rounded @ matrix.T)
        assert error < EMULATION_TOLERANCE, f"int8 {shape}: {error}"
        error = relative_error(fast(x), x.double() @ matrix.T)
        assert error < INT8_TOLERANCE, f"int8 against unrounded inputs {shape}: {error}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_used_in_full_precision(instruction_set: str, dtype: torch.dtype) -> None:
    weight = integer_weight(4, (40, 128, 32), dtype=dtype)
    weight = QuantizedWeight(weight.scheme, {**weight.tensors, "scales": weight["scales"] * 1e-3}, weight.shape)
    x = torch.randn(3, 128)
    found = CpuLinear(weight, None, activations="float")(x)
    assert relative_error(found, x.double() @ weight.dequantize(torch.float64).T) < FLOAT_TOLERANCE


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_a_row_is_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    instruction_set: str, activations: str
) -> None:
    weight = integer_weight(4, (200, 192, 64))
    x = torch.randn(150, 192)
    whole = CpuLinear(weight, None, activations=activations, num_threads=2)(x)
    for num_threads in (1, 3):
        layer = CpuLinear(weight, None, activations=activations, num_threads=num_threads)
        for rows in (slice(0, 1), slice(3, 5), slice(7, 14), slice(20, 51), slice(60, 150)):
            assert torch.equal(layer(x[rows]), whole[rows])


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(instruction_set: str, activations: str, value: float) -> None:
    weight = integer_weight(4, (33, 128, 32))
    layer = CpuLinear(weight, None, activations=activations)
    x = torch.randn(8, 128)
    clean = layer(x)
    dirty = x.clone()
    dirty[2, 77] = value
    found = layer(dirty)
    others = [row for row in range(8) if row != 2]
    assert torch.equal(found[others], clean[others])
    assert not found[2].isfinite().any()


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_extreme_inputs_are_computed(instruction_set: str, activations: str) -> None:
    weight = integer_weight(4, (20, 64, 32))
    layer = CpuLinear(weight, None, activations=activations)
    x = torch.randn(4, 64) * torch.tensor([0.0, 1e-30, 1.0, 1e30])[:, None]
    x[3, 5] = 1e36
    expected = x.double() @ weight.dequantize(torch.float64).T
    found = layer(x)
    assert torch.equal(found[0], torch.zeros(20))
    for row in (1, 2):
        assert relative_error(found[row], expected[row]) < INT8_TOLERANCE
    assert relative_error(found[3], expected[3]) < INT8_TOLERANCE


def test_no_rows_give_no_rows(compiled: None) -> None:
    layer = CpuLinear(integer_weight(4, (20, 64, 32)), None, activations="int8")
    assert layer(torch.empty(0, 64)).shape == (0, 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_inputs_dtype(compiled: None, dtype: torch.dtype) -> None:
    layer = CpuLinear(integer_weight(4, (20, 64, 32)), None, activations="float")
    x = torch.randn(3, 64).to(dtype)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


def test_inputs_need_not_be_contiguous(compiled: None) -> None:
    layer = CpuLinear(integer_weight(4, (20, 64, 32)), None, activations="int8")
    x = torch.randn(64, 5)
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))


@pytest.mark.parametrize("x", [torch.zeros(3, 63), torch.zeros(64), torch.zeros(1, 3, 64), torch.zeros(2, 64).int()])
def test_an_input_of_the_wrong_shape_or_type_is_refused(compiled: None, x: Tensor) -> None:
    layer = CpuLinear(integer_weight(4, (20, 64, 32)), None, activations="int8")
    with pytest.raises(UsageError, match=r"must be a float \[rows, 64\] on the CPU"):
        layer(x)


def test_a_bias_of_the_wrong_length_is_refused(compiled: None) -> None:
    with pytest.raises(UsageError, match="20 outputs"):
        CpuLinear(integer_weight(4, (20, 64, 32)), torch.zeros(19), activations="int8")


def test_an_unknown_mode_is_refused(compiled: None) -> None:
    with pytest.raises(UsageError, match="must be int8 or float"):
        CpuLinear(integer_weight(4, (20, 64, 32)), None, activations="int4")
