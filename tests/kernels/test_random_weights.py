"""Random weights: of any scheme, sized like a model's, and with codes that take every value."""

from __future__ import annotations

import pytest
import torch

from aphroquant.kernels.benchmark.scheme_names import scheme_of
from aphroquant.kernels.random_weights import random_weight

NAMES = [
    "w4g128", "w3g64-asym", "w8", "w2g32", "w4g128-act-order", "w8a8", "fp8", "fp8-tensor", "fp8-block", "nf4", "fp4",
    "mxfp4", "nvfp4", "aqlm-2x8", "aqlm-1x16", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q8_0", "bf16",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_random_weight_is_whole_finite_and_not_zero(name: str) -> None:
    weight = random_weight(scheme_of(name), 128, 512)
    weight.check("layer")
    matrix = weight.dequantize(torch.float64)
    assert matrix.shape == (128, 512)
    assert matrix.isfinite().all()
    assert 1e-3 < float(matrix.abs().mean()) < 10
    if "codes" in weight.tensors and weight["codes"].dtype == torch.uint8:
        assert int(weight["codes"].max()) == 2 ** (weight.scheme.storage_bits("codes") or 8) - 1
