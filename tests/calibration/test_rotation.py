"""Rotations: orthogonal, spread evenly, and the same however many rows are rotated at once."""

from __future__ import annotations

import pytest
import torch

from aphroquant.calibration import rotation
from aphroquant.calibration.rotation import hadamard_factors, random_rotation

EXACT = 1e-12
HADAMARD_SIZES = (1, 2, 12, 20, 28, 36, 44, 60, 104, 128, 180, 576, 896, 960, 1536, 2880)


def matrix_of(size: int, seed: int = 0) -> torch.Tensor:
    return random_rotation(size, torch.Generator().manual_seed(seed)).columns(torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [*HADAMARD_SIZES, 7, 18, 50])
def test_a_rotation_is_orthogonal(size: int) -> None:
    matrix = matrix_of(size)
    assert float((matrix @ matrix.T - torch.eye(size)).abs().max()) < EXACT


@pytest.mark.parametrize("size", HADAMARD_SIZES)
def test_where_a_hadamard_matrix_is_known_all_entries_have_one_magnitude(size: int) -> None:
    assert float((matrix_of(size).abs() * size**0.5 - 1).abs().max()) < EXACT


@pytest.mark.parametrize("size", [3, 7, 18, 50, 52])
def test_sizes_without_one_say_so(size: int) -> None:
    assert hadamard_factors(size) is None


@pytest.mark.parametrize("size", [24, 50])
def test_rows_are_rotated_by_the_transpose(size: int) -> None:
    turned, values = random_rotation(size, torch.Generator().manual_seed(1)), torch.randn(size, 5, dtype=torch.float64)
    assert torch.allclose(turned.rows(values), matrix_of(size, 1).T @ values, atol=EXACT)


def test_scales_come_before_the_rotation_and_the_dtype_stays() -> None:
    turned, values = random_rotation(24, torch.Generator().manual_seed(2)), torch.randn(6, 24)
    scales = torch.rand(24) + 0.5
    expected = (values * scales).double() @ matrix_of(24, 2)
    found = turned.columns(values, scales)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    turned, values = random_rotation(36, torch.Generator().manual_seed(3)), torch.randn(10, 36, dtype=torch.float64)
    whole = turned.columns(values)
    monkeypatch.setattr(rotation, "_ELEMENTS_AT_ONCE", 3 * 36)
    assert torch.allclose(turned.columns(values), whole, atol=EXACT)


def test_seeds_give_different_signs() -> None:
    assert not torch.equal(matrix_of(64, 0), matrix_of(64, 1))
