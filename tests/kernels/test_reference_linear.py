"""The reference layers, against arithmetic written out."""

from __future__ import annotations

import pytest
import torch

from aphroquant.kernels.reference.linear import ReferenceLinear, quantize_dequantize
from aphroquant.schemes import ActivationScheme, IntegerScheme, QuantizedWeight


def test_weight_only_layers_leave_the_input_alone() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 0]], dtype=torch.uint8)
    tensors = {"codes": codes, "scales": torch.tensor([[0.5, 1.0], [2.0, 4.0]]), "zeros": codes[:, ::2] * 0 + 1}
    weight = QuantizedWeight(IntegerScheme(2, 2, symmetric=False), tensors, (2, 4))
    layer = ReferenceLinear(weight, torch.tensor([10.0, 20.0]))
    found = layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert found.tolist() == [[10 - 0.5 + 0 + 3 + 8, 20 + 4 + 8 - 12 - 16]]


def test_a_dynamic_scale_belongs_to_a_row() -> None:
    x = torch.tensor([[127.0, 0.6, -3.4], [0.0, 0.0, 0.0], [2.54, 1.0, 0.03]])
    found = quantize_dequantize(x, ActivationScheme("int"))
    torch.testing.assert_close(found, torch.tensor([[127.0, 1.0, -3.0], [0.0, 0.0, 0.0], [2.54, 1.0, 0.04]]))
    assert torch.equal(found, quantize_dequantize(x, ActivationScheme("int", granularity="tensor")))


def test_static_inputs_saturate() -> None:
    scheme = ActivationScheme("int", dynamic=False, granularity="tensor")
    found = quantize_dequantize(torch.tensor([[5.0, -500.0, 0.26]]), scheme, torch.tensor(0.5))
    assert found.tolist() == [[5.0, -64.0, 0.5]]


def test_float_inputs_are_rounded_to_fp8() -> None:
    scheme = ActivationScheme("float", dynamic=False, granularity="tensor")
    found = quantize_dequantize(torch.tensor([[1.06, 1.07, 1e6]]), scheme, torch.tensor(1.0))
    assert found.tolist() == [[1.0, 1.125, 448.0]]


@pytest.mark.parametrize("columns", [4, 5, 7])
def test_groups_have_scales_of_their_own_and_the_last_may_be_short(columns: int) -> None:
    x = torch.randn(3, columns)
    found = quantize_dequantize(x, ActivationScheme("int", granularity="group", group_size=4))
    parts = [quantize_dequantize(part, ActivationScheme("int")) for part in x.split(4, dim=1)]
    assert torch.equal(found, torch.cat(parts, 1))
