"""Repacking between the integer formats loses nothing: the same weight to the last bit, by an independent unpacker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aphroquant.formats.awq import Awq
from aphroquant.formats.base import Format
from aphroquant.formats.compressed_tensors import CompressedTensors
from aphroquant.formats.gptq import Gptq
from aphroquant.schemes import IntegerScheme, QuantizedWeight, Scheme

Fixture = Callable[..., Any]
MODULE = "model.layers.0.mlp.down_proj"
WRITERS: dict[str, Callable[[dict[str, Scheme]], Format]] = {
    "awq": lambda schemes: Awq.for_schemes(schemes, []),
    "gptq v1": lambda schemes: Gptq.for_schemes(schemes, [], checkpoint_format="gptq"),
    "gptq v2": lambda schemes: Gptq.for_schemes(schemes, [], checkpoint_format="gptq_v2"),
    "compressed-tensors": lambda schemes: CompressedTensors.for_schemes(schemes, []),
}
HOLDS = {"awq": (4,), "gptq v1": (2, 3, 4, 8), "gptq v2": (2, 3, 4, 8), "compressed-tensors": (2, 3, 4, 8)}
PAIRS = [(source, target) for source in WRITERS for target in WRITERS if source != target]


def stored(
    writer: Callable[[dict[str, Scheme]], Format], weight: QuantizedWeight
) -> tuple[Format, dict[str, torch.Tensor]]:
    written = writer({MODULE: weight.scheme})
    return written, written.write(MODULE, weight)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_repacked_weight_is_bit_equal(
    source: str, target: str, data: st.DataObject, unpacked: Fixture, integer_weight: Fixture, reread: Fixture
) -> None:
    bits = data.draw(st.sampled_from([b for b in HOLDS[source] if b in HOLDS[target]]), "bits")
    whole = 32 if bits == 3 else 32 // bits
    n = whole * data.draw(st.integers(1, 32 // whole), "output words") * (2 if bits == 8 else 1)
    group = data.draw(st.sampled_from([None, whole, 32, 64]), "group size")
    k = 64 * data.draw(st.integers(1, 2), "input blocks")
    scheme = IntegerScheme(bits, group, symmetric=data.draw(st.booleans(), "symmetric"))
    weight = integer_weight(scheme, n, k, data.draw(st.integers(0, 999), "seed"))

    first, tensors = stored(WRITERS[source], weight)
    read = reread(first).read(MODULE, tensors)
    second, repacked = stored(WRITERS[target], read)
    again = reread(second).read(MODULE, repacked)

    exact = weight.dequantize().numpy()
    assert np.array_equal(unpacked(first.quantization_config(), tensors), exact)
    assert np.array_equal(unpacked(second.quantization_config(), repacked), exact)
    assert np.array_equal(again.dequantize().numpy(), exact)
    assert read.scheme == again.scheme == scheme
    for name, tensor in weight.tensors.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("target", WRITERS)
@pytest.mark.parametrize("zero", [0, 15])
def test_the_outermost_zero_points_survive(
    target: str, zero: int, unpacked: Fixture, integer_weight: Fixture, reread: Fixture
) -> None:
    weight = integer_weight(IntegerScheme(4, 32, symmetric=False), 8, 64)
    weight = QuantizedWeight(
        weight.scheme, {**weight.tensors, "zeros": torch.full_like(weight["zeros"], zero)}, (8, 64)
    )
    written, tensors = stored(WRITERS[target], weight)
    assert np.array_equal(unpacked(written.quantization_config(), tensors), weight.dequantize().numpy())
    assert torch.equal(reread(written).read(MODULE, tensors)["zeros"], weight["zeros"])


@pytest.mark.parametrize("target", WRITERS)
def test_negative_and_subnormal_scales_survive(
    target: str, unpacked: Fixture, integer_weight: Fixture, reread: Fixture
) -> None:
    weight = integer_weight(IntegerScheme(4, 32, symmetric=True), 8, 64)
    scales = weight["scales"].clone()
    scales[0, 0], scales[1, 1], scales[2, 0] = -0.25, 2**-24, 0.0
    weight = QuantizedWeight(weight.scheme, {**weight.tensors, "scales": scales}, (8, 64))
    written, tensors = stored(WRITERS[target], weight)
    assert np.array_equal(unpacked(written.quantization_config(), tensors), weight.dequantize().numpy())
    assert torch.equal(reread(written).read(MODULE, tensors)["scales"], scales)
