"""Layers of the CUDA backend that need no kernel: right for every scheme, in pieces or whole."""

from __future__ import annotations

import gc

import pytest
import torch

from aphroquant.errors import InputError
from aphroquant.kernels.cuda.backend import fallback_reason
from aphroquant.kernels.cuda.dequantizing import DenseLinear, DequantizingLinear
from aphroquant.kernels.cuda.operator import RegisteredLinear
from aphroquant.kernels.dispatch import select_backend
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.reference.linear import ReferenceLinear
from aphroquant.schemes import (
    ActivationScheme,
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

SCHEMES: list[Scheme] = [
    IntegerScheme(4, 32, symmetric=False),
    IntegerScheme(8, None, symmetric=True, activations=ActivationScheme("int")),
    FloatScheme("block", (16, 32)),
    FloatScheme("channel", activations=ActivationScheme("float")),
    LookupScheme("nf4", 32, "float", flattened=True),
    AffineScheme(4, 32, axis=0),
    AdditiveScheme(2, 8, 1, 8),
    KQuantScheme("q4_k"),
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("piece", [1, 256 * 20, 1 << 24])
def test_the_fallback_computes_every_scheme_whatever_its_pieces(scheme: Scheme, piece: int) -> None:
    weight, x, bias = random_weight(scheme, 64, 256), torch.randn(5, 256), torch.randn(64)
    layer = DequantizingLinear(weight, bias, CPU, piece)
    assert (layer.out_features, layer.in_features) == weight.shape
    torch.testing.assert_close(layer(x), ReferenceLinear(weight, bias)(x), rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 64)


def test_the_fallback_refuses_inputs_that_it_cannot_round() -> None:
    scheme = LookupScheme(
        "e2m1", 16, "float", activations=ActivationScheme("float", bits=4, granularity="group", group_size=16)
    )
    with pytest.raises(InputError, match="no kernel rounds inputs to 4-bit floats"):
        DequantizingLinear(random_weight(scheme, 16, 32), None, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_layers_take_the_inputs_dtype(dtype: torch.dtype) -> None:
    weight, x = torch.randn(6, 4).bfloat16(), torch.randn(3, 4, dtype=dtype)
    layer = DenseLinear(QuantizedWeight.dense(weight), torch.ones(6), CPU)
    found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, x @ weight.to(dtype).T + 1, rtol=1e-2, atol=1e-2)


def test_the_kernel_is_chosen_by_the_scheme() -> None:
    bf16 = torch.bfloat16
    assert fallback_reason(DenseScheme(bf16), bf16) is None
    assert fallback_reason(IntegerScheme(4, 128, symmetric=True), bf16) is None
    assert fallback_reason(KQuantScheme("q2_k"), bf16) is None
    assert fallback_reason(AffineScheme(4, 64), bf16) == "there is no CUDA kernel for int4 real zeros g64"
    flat = LookupScheme("nf4", 64, "float", flattened=True)
    assert fallback_reason(flat, bf16, 4096) is None
    assert "cross rows of 1000 columns" in str(fallback_reason(flat, bf16, 1000))
    quantized_inputs = IntegerScheme(8, None, symmetric=True, activations=ActivationScheme("int"))
    assert "no CUDA kernel for quantized inputs" in str(fallback_reason(quantized_inputs, bf16))
    assert "not float32" in str(fallback_reason(IntegerScheme(4, 128, symmetric=True), torch.float32))


def test_a_prepared_layer_is_an_operator_with_a_known_shape() -> None:
    layer = RegisteredLinear(ReferenceLinear(QuantizedWeight.dense(torch.randn(6, 4)), torch.randn(6)))
    x = torch.randn(3, 4)
    torch.library.opcheck(torch.ops.aphroquant.linear.default, (x, layer.number, 6))
    assert torch.equal(torch.ops.aphroquant.linear(x, layer.number, 6), layer(x))


def test_the_operator_runs_in_compiled_code() -> None:
    layer = RegisteredLinear(ReferenceLinear(QuantizedWeight.dense(torch.randn(6, 4)), None))
    x = torch.randn(3, 4)
    compiled = torch.compile(lambda inputs: layer(inputs) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x) * 2)


def test_a_layer_that_is_gone_is_told() -> None:
    layer = RegisteredLinear(ReferenceLinear(QuantizedWeight.dense(torch.randn(6, 4)), None))
    number = layer.number
    del layer
    gc.collect()
    with pytest.raises(RuntimeError, match=f"the layer {number} of aphroquant::linear is gone"):
        torch.ops.aphroquant.linear(torch.randn(3, 4), number, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [*SCHEMES, DenseScheme(torch.bfloat16)], ids=str)
def test_the_backend_runs_every_scheme(cuda: None, scheme: Scheme) -> None:
    weight = random_weight(scheme, 64, 256)
    x, bias = torch.randn(5, 256).bfloat16(), torch.randn(64) * 0.1
    layer = select_backend("cuda").prepare(weight, bias)
    expected = ReferenceLinear(weight, bias)(x.float()).double()
    found = layer(x.cuda()).double().cpu()
    assert float((found - expected).norm() / expected.norm()) < 8e-3
