"""Sums of codebook vectors are what the formula says, judged in float64 by scalar loops."""

from __future__ import annotations

import pytest
import torch

from aphroquant.errors import InputError, UsageError
from aphroquant.schemes import AdditiveScheme, QuantizedWeight


def weight_of(scheme: AdditiveScheme, n: int, k: int) -> QuantizedWeight:
    shapes = scheme.shapes(n, k)
    dtype = torch.uint8 if scheme.code_bits <= 8 else torch.int32
    tensors = {
        "codes": torch.randint(0, 2**scheme.code_bits, shapes["codes"], dtype=dtype),
        "codebooks": torch.randn(shapes["codebooks"]).half(),
        "scales": torch.rand(shapes["scales"]).half(),
    }
    return QuantizedWeight(scheme, tensors, (n, k))


@pytest.mark.parametrize(
    "scheme",
    [AdditiveScheme(1, 10), AdditiveScheme(2, 8), AdditiveScheme(3, 5, out_group=2, in_group=4), AdditiveScheme(1, 1)],
    ids=str,
)
def test_every_element_is_the_scaled_sum_of_its_codebook_entries(scheme: AdditiveScheme) -> None:
    weight = weight_of(scheme, 6, 24)
    weight.check("layer")
    dequantized = weight.dequantize(torch.float64)
    for row in range(6):
        for column in range(24):
            i, a = divmod(row, scheme.out_group)
            j, c = divmod(column, scheme.in_group)
            entries = [
                float(weight["codebooks"][m, int(weight["codes"][i, j, m]), a, c]) for m in range(scheme.num_codebooks)
            ]
            expected = float(weight["scales"][i]) * sum(entries)
            assert float(dequantized[row, column]) == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_num_bits_counts_codes_at_their_width_and_the_codebooks() -> None:
    n, k = 6, 24
    expected = (n // 2) * (k // 4) * 3 * 5 + 3 * 32 * 2 * 4 * 16 + (n // 2) * 16
    assert weight_of(AdditiveScheme(3, 5, out_group=2, in_group=4), n, k).num_bits == expected


def test_shapes_that_the_groups_do_not_divide_are_refused() -> None:
    weight = weight_of(AdditiveScheme(1, 8), 4, 16)
    with pytest.raises(InputError, match=r"\[4, 20\] is no multiple"):
        QuantizedWeight(weight.scheme, weight.tensors, (4, 20)).check("layer")


@pytest.mark.parametrize("arguments", [(0, 8), (1, 0), (1, 32), (1, 8, 0), (1, 8, 1, -8)])
def test_impossible_schemes_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        AdditiveScheme(*arguments)


def test_schemes_read_well() -> None:
    assert str(AdditiveScheme(1, 16)) == "additive 1x16 g8"
    assert str(AdditiveScheme(2, 8, out_group=4)) == "additive 2x8 g4x8"
