"""Pieces of rows dequantize to the rows of the whole, whatever the scheme."""

from __future__ import annotations

import pytest
import torch

from aphroquant.schemes import (
    AdditiveScheme,
    AffineScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)
from aphroquant.schemes.rows import split_rows

SCHEMES: list[Scheme] = [
    DenseScheme(torch.bfloat16),
    IntegerScheme(4, 32, symmetric=False),
    IntegerScheme(3, None, symmetric=True),
    IntegerScheme(4, 48, symmetric=False, act_order=True),
    IntegerScheme(4, 32, symmetric=False, has_offsets=True),
    FloatScheme("tensor"),
    FloatScheme("channel"),
    FloatScheme("block", (8, 128)),
    LookupScheme("nf4", 64, "float", flattened=True),
    LookupScheme("nf4", 60, "float", flattened=True),
    LookupScheme("nf4", 64, "nested", flattened=True),
    LookupScheme("e2m1", 32, "e8m0"),
    LookupScheme("e2m1", 16, "e4m3"),
    AdditiveScheme(2, 8, 4, 8),
    AffineScheme(4, 64),
    AffineScheme(4, 384),
    AffineScheme(4, None),
    AffineScheme(4, 64, axis=0),
    KQuantScheme("q4_k"),
    KQuantScheme("q6_k"),
]


def random_weight(scheme: Scheme, rows: int, columns: int) -> QuantizedWeight:
    """Random numbers in the shapes and dtypes of a scheme."""
    tensors = {}
    dtypes = scheme.dtypes()
    for name, shape in scheme.shapes(rows, columns).items():
        if name == "group_index":
            assert isinstance(scheme, IntegerScheme)
            tensors[name] = torch.randint(0, scheme.num_groups(columns), shape, dtype=torch.int32)
        elif name in ("codes", "zeros", "sub_scales", "sub_mins") or dtypes.get(name) == torch.uint8:
            tensors[name] = torch.randint(0, 2 ** (scheme.storage_bits(name) or 8), shape).to(
                dtypes.get(name, torch.uint8)
            )
        else:
            tensors[name] = (torch.rand(shape) + 0.5).to(dtypes.get(name, torch.float32))
    if isinstance(scheme, FloatScheme):
        tensors["codes"] = torch.randn(rows, columns).to(scheme.dtype)
    if isinstance(scheme, AffineScheme):
        tensors["zeros"] = torch.rand(tensors["zeros"].shape) * 15
    return QuantizedWeight(scheme, tensors, (rows, columns))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 37, 64])
def test_the_pieces_are_the_rows_of_the_whole(scheme: Scheme, rows: int) -> None:
    columns = 256
    if isinstance(scheme, AdditiveScheme) or rows * columns % (getattr(scheme, "group_size", None) or 1):
        rows += -rows % 12
    weight = random_weight(scheme, rows, columns)
    pieces = list(split_rows(weight, 9 * columns))
    for piece in pieces:
        piece.check("piece")
    assert torch.equal(torch.cat([piece.dequantize() for piece in pieces]), weight.dequantize())
    assert sum(piece.shape[0] for piece in pieces) == rows
    if rows == 64 and not (isinstance(scheme, AffineScheme) and scheme.axis == 0):
        assert len(pieces) > 1 or scheme == LookupScheme("nf4", 64, "nested", flattened=True)


def test_a_small_weight_stays_whole() -> None:
    weight = QuantizedWeight.dense(torch.rand(3, 4))
    assert list(split_rows(weight, 12)) == [weight]


def test_a_piece_has_at_least_one_row() -> None:
    weight = QuantizedWeight.dense(torch.rand(3, 4))
    assert [piece.shape for piece in split_rows(weight, 2)] == [(1, 4)] * 3
