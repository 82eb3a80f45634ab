"""Layers with packed and FP8 weights on a GPU, as they are used: any number of tokens, odd shapes, broken inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda.device import obstacle
from aphroquant.kernels.cuda.float8.linear import CudaFloat8Linear, unsupported
from aphroquant.kernels.cuda.integer.batch import BatchLinear
from aphroquant.kernels.cuda.integer.packing import PackedInteger, pack, pack_groups, unpack
from aphroquant.kernels.cuda.integer.row_parts import multiply_parts, row_parts
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.reference.linear import quantize_dequantize
from aphroquant.schemes import ActivationScheme, FloatScheme, IntegerScheme, QuantizedWeight, Scheme

pytestmark = pytest.mark.gpu
# Relative error in the norm: what rounding weights and outputs does, and no more.
TOLERANCE = {torch.bfloat16: 3.5e-3, torch.float16: 6e-4}
FLOAT8_TOLERANCE = 8e-3  # a code that is rounded the other way is 6 % off; these are few
TOKENS = [1, 15, 17, 33, 64, 100, 129, 300, 600]

GROUPED = ActivationScheme("float", granularity="group", group_size=128)
SCHEMES: dict[str, Scheme] = {
    "4 bits": IntegerScheme(4, 128, True),
    "4 bits, zeros, groups of 32": IntegerScheme(4, 32, False),
    "4 bits, offsets": IntegerScheme(4, 32, False, has_offsets=True),
    "4 bits, act-order": IntegerScheme(4, 64, False, act_order=True),
    "8 bits, channel": IntegerScheme(8, None, True),
    "3 bits": IntegerScheme(3, 64, False),
    "2 bits": IntegerScheme(2, 128, False),
}
FLOAT_SCHEMES: dict[str, FloatScheme] = {
    "tensor": FloatScheme("tensor"),
    "channel": FloatScheme("channel"),
    "block": FloatScheme("block", (128, 128)),
    "tensor, tokens": FloatScheme("tensor", activations=ActivationScheme("float")),
    "channel, tokens": FloatScheme("channel", activations=ActivationScheme("float")),
    "tensor, static": FloatScheme("tensor", activations=ActivationScheme("float", dynamic=False, granularity="tensor")),
    "block, groups": FloatScheme("block", (128, 128), activations=GROUPED),
}


@pytest.fixture(autouse=True)
def on_gpu() -> None:
    if reason := obstacle():
        pytest.skip(reason)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", SCHEMES)
def test_integer_layers_multiply_any_number_of_tokens(name: str, tokens: int) -> None:
    weight = random_weight(SCHEMES[name], 203, 1000, "cuda")
    bias = torch.randn(203, device="cuda")
    dtype = torch.float16 if tokens % 2 else torch.bfloat16
    layer = BatchLinear(pack(weight, "cuda"), bias)
    x = torch.randn(tokens, 1000, device="cuda").to(dtype)
    out = torch.full((tokens, 203), torch.nan, dtype=dtype, device="cuda")
    layer(x, out)
    assert relative_error(out, x.double() @ weight.dequantize(torch.float64).T + bias.double()) < TOLERANCE[dtype]
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", FLOAT_SCHEMES)
def test_float8_layers_multiply_any_number_of_tokens(name: str, tokens: int) -> None:
    scheme = FLOAT_SCHEMES[name]
    if reason := unsupported(scheme):
        pytest.skip(reason)
    weight = random_weight(scheme, 203, 1000, "cuda")
    x = torch.randn(tokens, 1000, device="cuda").to(torch.bfloat16)
    layer = CudaFloat8Linear(weight, None)
    inputs = x.float()
    if scheme.activations is not None:
        inputs = quantize_dequantize(inputs, scheme.activations, weight.tensors.get("input_scale"))
    out = layer(x)
    expected = inputs.double() @ weight.dequantize(torch.float64).T
    assert relative_error(out, expected) < (TOLERANCE[torch.bfloat16] if not scheme.activations else FLOAT8_TOLERANCE)
    assert torch.equal(layer(x), out)


def packed_weight(rows: int, columns: int) -> PackedInteger:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda")
    return pack_groups(4, codes, torch.rand(rows, columns // 128, device="cuda").to(torch.bfloat16), 128)


@pytest.mark.parametrize(
    "tile",
    [
        WgmmaTile(64, split=4),
        WgmmaTile(64, warpgroups=4, split=2, multicast=2),
        WgmmaTile(128, warpgroups=3, chunks=1, multicast=2),
        WgmmaTile(256, chunks=1, multicast=2, persistent=True),
        WgmmaTile(128, tiles=2, chunks=1, steps=2, multicast=4, persistent=True),
        WgmmaTile(192, chunks=1, stages=3, persistent=True),
        WgmmaTile(256, chunks=1, stages=4, multicast=2, persistent=True, lead=3),
        WgmmaTile(16, warpgroups=1, split=8, blocks=2),
        WgmmaTile(64, warpgroups=1, persistent=True, cut=True),
    ],
    ids=str,
)
def test_every_cut_gives_the_product(tile: WgmmaTile) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs a Hopper GPU")
    packed, x = packed_weight(1468, 2048), torch.randn(530, 2048, device="cuda").to(torch.bfloat16)
    out = torch.full((530, 1468), torch.nan, dtype=torch.bfloat16, device="cuda")
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    parts = row_parts(1468, 2048, 530, tile, multiprocessors)
    multiply_parts(packed, x, None, parts, out=out)
    assert relative_error(out, x.double() @ unpack(packed, torch.float64).T) < TOLERANCE[torch.bfloat16]
    assert torch.equal(multiply_parts(packed, x, None, parts), out)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_token_breaks_no_other(value: float) -> None:
    layer = BatchLinear(packed_weight(256, 1024), None)
    x = torch.randn(40, 1024, device="cuda").to(torch.bfloat16)
    clean = layer(x)
    x[7, 100] = value
    broken = layer(x)
    assert not broken[7].isfinite().any()
    broken[7] = clean[7]
    assert torch.equal(broken, clean)


def test_a_weight_that_is_not_a_number_reaches_its_row_alone() -> None:
    scheme = FloatScheme("channel")
    if reason := unsupported(scheme):
        pytest.skip(reason)
    weight = random_weight(scheme, 128, 256, "cuda")
    codes = weight["codes"].view(torch.uint8).clone()
    codes[5, 17] = 0xFF
    tensors = dict(weight.tensors) | {"codes": codes.view(torch.float8_e4m3fn)}
    out = CudaFloat8Linear(QuantizedWeight(scheme, tensors, weight.shape), None)(
        torch.randn(3, 256, device="cuda").half()
    )
    assert out[:, 5].isnan().all() and out[:, :5].isfinite().all() and out[:, 6:].isfinite().all()


def test_layers_are_captured_in_graphs() -> None:
    layer = BatchLinear(packed_weight(256, 1024), None)
    x = torch.randn(48, 1024, device="cuda").to(torch.bfloat16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    x.copy_(torch.randn(48, 1024, device="cuda"))
    graph.replay()
    assert torch.equal(captured, layer(x))
