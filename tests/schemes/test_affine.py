"""Real zero points and groups of the flattened weight: the formula, judged in float64 by scalar loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aphroquant.errors import InputError, UsageError
from aphroquant.schemes import AffineScheme, QuantizedWeight


def weight_of(scheme: AffineScheme, n: int, k: int) -> QuantizedWeight:
    groups = scheme.num_groups(n, k)
    tensors = {
        "codes": torch.randint(0, 2**scheme.bits, (n, k), dtype=torch.uint8),
        "scales": torch.rand(groups).half(),
        "zeros": torch.randn(groups).half(),
    }
    return QuantizedWeight(scheme, tensors, (n, k))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group_size", [1, 4, 12, 24, 30])  # 30 crosses rows
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_every_element_follows_the_formula(bits: int, group_size: int, axis: Any) -> None:
    weight = weight_of(AffineScheme(bits, group_size, axis), 5, 24)
    weight.check("layer")
    dequantized = weight.dequantize(torch.float64).flatten().tolist()
    groups = 5 * 24 // group_size
    for flat, code in enumerate(weight["codes"].flatten().tolist()):
        group = flat // group_size if axis == 1 else flat % groups
        assert dequantized[flat] == (code - float(weight["zeros"][group])) * float(weight["scales"][group])


def test_without_a_group_size_a_row_is_a_group_or_along_the_other_axis_a_column() -> None:
    rows, columns = weight_of(AffineScheme(4, None), 2, 3), weight_of(AffineScheme(4, None, axis=0), 2, 3)
    by_row = (rows["codes"].double() - rows["zeros"].double()[:, None]) * rows["scales"].double()[:, None]
    by_column = (columns["codes"].double() - columns["zeros"].double()) * columns["scales"].double()
    assert torch.equal(rows.dequantize(torch.float64), by_row)
    assert torch.equal(columns.dequantize(torch.float64), by_column)


def test_num_bits_counts_codes_at_their_width() -> None:
    assert weight_of(AffineScheme(3, 12), 5, 24).num_bits == 120 * 3 + 10 * 2 * 16


def test_a_weight_that_is_no_whole_number_of_groups_is_refused() -> None:
    weight = weight_of(AffineScheme(4, 12), 5, 24)
    with pytest.raises(InputError, match=r"\[5, 23\] is no whole number of groups of 12"):
        QuantizedWeight(weight.scheme, weight.tensors, (5, 23)).check("layer")


@pytest.mark.parametrize("arguments", [(9, 64), (4, 0), (4, 64, 2)])
def test_impossible_schemes_are_refused(arguments: Any) -> None:
    with pytest.raises(UsageError):
        AffineScheme(*arguments)


def test_schemes_read_well() -> None:
    assert str(AffineScheme(4, 64)) == "int4 real zeros g64"
    assert str(AffineScheme(2, 16, axis=0)) == "int2 real zeros g16 axis 0"
    assert str(AffineScheme(8, None)) == "int8 real zeros row"
