"""The reference layers, against arithmetic written out."""

from __future__ import annotations

import pytest
import torch

from aphroquant.kernels.reference.linear import ReferenceLinear, quantize_dequantize
from aphroquant.schemes import ActivationScheme, IntegerScheme, QuantizedWeight

NVFP4_INPUTS = ActivationScheme("float", 4, granularity="group", group_size=16)


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


def test_four_bit_inputs_under_a_global_scale_are_those_of_compressed_tensors() -> None:
    """NVFP4 inputs: the library divides by the reciprocal of our scale, here a power of two."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    x, common = torch.randn(6, 64) * torch.rand(6, 1), torch.tensor([2.0**7])
    groups = x.view(6, 4, 16)
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, global_scale=common)
    scales = scales.to(torch.float8_e4m3fn).float()
    codes = quantize(x, scales, None, arguments, global_scale=common)
    expected = dequantize(codes, scales, None, arguments, global_scale=common)
    found = quantize_dequantize(x, NVFP4_INPUTS, 1 / common.double())
    assert torch.equal(found, expected)


def test_four_bit_inputs_without_a_global_scale_have_powers_of_two() -> None:
    x = torch.randn(6, 64) * torch.rand(6, 1)
    found = quantize_dequantize(x, ActivationScheme("float", 4, granularity="group", group_size=32)).view(6, 2, 32)
    largest = x.view(6, 2, 32).abs().amax(-1)
    steps = 2.0 ** torch.floor(torch.log2(largest / 1.75 * 2)) / 8  # half of the scale, which is the smallest code
    assert torch.equal(found / steps[..., None], (found / steps[..., None]).round())
    assert float((found - x.view(6, 2, 32)).abs().div(largest[..., None]).max()) <= 0.25


def test_zeros_stay_zeros_in_four_bits() -> None:
    for inputs, scale in ((NVFP4_INPUTS, torch.tensor(0.5)), (ActivationScheme("float", 4, True, "group", 32), None)):
        assert torch.equal(quantize_dequantize(torch.zeros(2, 32), inputs, scale), torch.zeros(2, 32))
