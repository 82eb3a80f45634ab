"""Times, floors and errors: arithmetic that can be done by hand."""

from __future__ import annotations

import pytest
import torch

from aphroquant.kernels.benchmark import cpu_run
from aphroquant.kernels.benchmark.layer_shapes import LayerShape
from aphroquant.kernels.benchmark.measure import (
    Ceilings,
    Measurement,
    error_of,
    floor_microseconds,
    product_dtype,
    weight_bytes,
)
from aphroquant.kernels.benchmark.peers import dense_weight
from aphroquant.kernels.benchmark.scheme_names import scheme_of
from aphroquant.kernels.dispatch import select_backend
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import QuantizedWeight

CEILINGS = Ceilings(1e12, {"bfloat16": 1e14, "float32": 1e13})


def test_a_4_bit_weight_has_half_a_byte_and_its_scales_share() -> None:
    weight = random_weight(scheme_of("w4g128"), 256, 1024)
    assert weight_bytes(weight) == 256 * 1024 // 2 + 256 * 8 * 2


def test_the_floor_is_the_longer_of_moving_and_computing() -> None:
    assert floor_microseconds(10**6, 10**6, "bfloat16", CEILINGS) == pytest.approx(1.0)
    assert floor_microseconds(10**6, 10**9, "bfloat16", CEILINGS) == pytest.approx(10.0)


def test_rates_and_the_share_follow_from_the_time() -> None:
    found = Measurement("kernel", "o", 1000, 2000, 10, 4.0, 10**6, 1.0, None)
    assert found.gigabytes_per_second == pytest.approx(250)
    assert found.teraflops == pytest.approx(2 * 10 * 1000 * 2000 / 4e-6 / 1e12)
    assert found.share == 0.25
    assert found.to_dict()["us"] == 4.0


def test_products_are_of_what_the_inputs_are_rounded_to() -> None:
    def product(name: str) -> str:
        return product_dtype(random_weight(scheme_of(name), 128, 128), torch.bfloat16)

    assert [product(name) for name in ("w4g128", "fp8-w8a16", "fp8", "w8a8")] == [
        "bfloat16",
        "bfloat16",
        "float8",
        "int8",
    ]


@pytest.mark.parametrize("name", ["w4g128", "fp8", "bf16"])
def test_the_error_is_relative_to_float64(name: str) -> None:
    weight, x = random_weight(scheme_of(name), 64, 256), torch.randn(3, 256)
    layer = select_backend("reference").prepare(weight, None)
    assert error_of(layer, weight, x) < 1e-6
    assert error_of(lambda rows: layer(rows) * 1.01, weight, x) == pytest.approx(0.01, rel=1e-3)
    assert error_of(lambda rows: layer(rows) * float("nan"), weight, x) != error_of(layer, weight, x)


def test_peers_without_quantization_get_the_same_numbers_in_16_bit() -> None:
    weight = random_weight(scheme_of("w4g128"), 64, 256)
    dense = dense_weight(weight, torch.bfloat16)
    assert torch.equal(dense["weight"], weight.dequantize(torch.bfloat16))
    assert dense_weight(dense, torch.bfloat16) is dense


def test_the_cpu_is_timed_with_its_error(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_run, "_SECONDS", 0.0)
    monkeypatch.setattr(cpu_run, "last_level_cache", lambda: 1000)
    shape, backend = LayerShape("o", 64, 256), select_backend("cpu", activations="float")
    found = list(cpu_run.measure_cpu(shape, scheme_of("w4g128"), [1, 3], backend, CEILINGS))
    assert [(m.kernel, m.rows) for m in found if isinstance(m, Measurement)] == [
        ("aphroquant", 1),
        ("aphroquant", 3),
        ("torch float32", 1),
        ("torch float32", 3),
    ]
    for measurement in found:
        assert isinstance(measurement, Measurement)
        assert measurement.error is not None
        assert measurement.error < 2e-6
        assert measurement.microseconds > 0


def test_the_last_level_cache_is_of_a_plausible_size() -> None:
    assert 1 << 18 <= cpu_run.last_level_cache() <= 1 << 32


def test_a_dense_weight_keeps_its_numbers() -> None:
    weight = QuantizedWeight.dense(torch.randn(4, 4))
    assert error_of(lambda x: x @ weight["weight"].T, weight, torch.randn(2, 4)) < 1e-6
