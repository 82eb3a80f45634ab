"""Names of shapes and schemes: the sizes of the published models, and errors that list what there is."""

from __future__ import annotations

import pytest

from aphroquant.errors import UsageError
from aphroquant.kernels.benchmark.layer_shapes import find_shapes, layer_shapes
from aphroquant.kernels.benchmark.scheme_names import scheme_of
from aphroquant.schemes import IntegerScheme


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama-3-8b", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]),
        ("llama-3-70b", [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]),
        ("qwen3-32b", [(10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)]),
    ],
)
def test_named_models_have_their_layers(name: str, sizes: list[tuple[int, int]]) -> None:
    assert [shape[1:] for shape in layer_shapes(name)] == sizes


def test_a_layer_can_be_written_as_numbers() -> None:
    assert layer_shapes("4096x14336") == [("4096x14336", 4096, 14336)]
    with pytest.raises(UsageError, match="must be positive"):
        layer_shapes("0x128")
    with pytest.raises(UsageError, match="'llama' must be one of llama-3-8b"):
        layer_shapes("llama")


def test_integer_schemes_are_written_by_their_parts() -> None:
    assert scheme_of("w4g128") == scheme_of("w4a16g128") == IntegerScheme(4, 128, True)
    assert scheme_of("w8") == IntegerScheme(8, None, True)
    assert scheme_of("w3g64-asym-act-order") == IntegerScheme(3, 64, False, act_order=True)


@pytest.mark.parametrize("name", ["w9g128", "int4", "", "w4g", "W4G128"])
def test_an_unknown_scheme_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match=r"must be wBITS\[gGROUP\].*fp8-block.*q4_k"):
        scheme_of(name)


def test_mixtures_of_experts_have_theirs() -> None:
    gate_up, down = find_shapes("qwen3-30b-a3b")
    assert gate_up == ("gate_up", 1536, 2048, 128, 8, True)
    assert down == ("down", 2048, 768, 128, 8, False)
    assert find_shapes("4096x14336") == layer_shapes("4096x14336")
    with pytest.raises(UsageError, match="mixtral-8x7b"):
        find_shapes("mixtral")
