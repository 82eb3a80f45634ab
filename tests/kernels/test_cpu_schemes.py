"""Every scheme on the compiled kernels: floats, super-blocks, tables, and inputs quantized as the scheme says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cpu.linear import CpuLinear
from aphroquant.kernels.reference.linear import quantize_dequantize
from aphroquant.schemes import (
    ActivationScheme,
    AffineScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)

FLOAT_TOLERANCE = 2e-6  # relative error in the norm of the result: float32 accumulation

DENSE = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FLOAT8 = [
    FloatScheme("tensor"),
    FloatScheme("channel"),
    FloatScheme("block", (32, 48)),
    FloatScheme("block", (128, 128)),
]
KQUANTS = [KQuantScheme(kind) for kind in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")]
LOOKUPS = [
    LookupScheme("nf4", 32, "float"),
    LookupScheme("fp4", 64, "float", flattened=True),
    LookupScheme("e2m1", 16, "float"),
    LookupScheme("iq4_nl", 32, "float"),
    LookupScheme("nf4", 48, "float", flattened=True),  # blocks that cross rows
]
AFFINES = [AffineScheme(4, 64), AffineScheme(3, 48), AffineScheme(8, None), AffineScheme(2, 32, axis=0)]
INPUTS = [
    ActivationScheme("int"),
    ActivationScheme("int", bits=4),
    ActivationScheme("int", dynamic=False, granularity="tensor"),
    ActivationScheme("int", granularity="group", group_size=48),
    ActivationScheme("float"),
    ActivationScheme("float", dynamic=False, granularity="tensor"),
    ActivationScheme("float", granularity="group", group_size=128),
    ActivationScheme("float", granularity="tensor"),
]


def random_weight(scheme: Scheme, n: int, k: int) -> QuantizedWeight:
    if isinstance(scheme, DenseScheme):
        return QuantizedWeight.dense(torch.randn(n, k).to(scheme.dtype))
    tensors: dict[str, Tensor] = {}
    for name, shape in scheme.shapes(n, k).items():
        dtype = scheme.dtypes().get(name, torch.uint8 if name in ("codes", "zeros") else torch.float32)
        bits = scheme.storage_bits(name) or 8
        if isinstance(scheme, FloatScheme) and name == "codes":
            tensors[name] = torch.randn(shape).mul(50).to(torch.float8_e4m3fn)
        elif isinstance(scheme, AffineScheme) and name == "zeros":
            tensors[name] = torch.rand(shape) * 2**scheme.bits
        elif dtype == torch.int8:
            tensors[name] = torch.randint(-32, 32, shape, dtype=dtype)
        elif dtype == torch.uint8:
            tensors[name] = torch.randint(0, 2**bits, shape, dtype=dtype)
        else:
            tensors[name] = torch.rand(shape) * 0.01 + 0.001
        if name in ("d", "dmin"):
            tensors[name] = tensors[name].half()
    activations = getattr(scheme, "activations", None)
    if activations is not None and not activations.dynamic:
        tensors["input_scale"] = torch.tensor(0.02)
    return QuantizedWeight(scheme, tensors, (n, k))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check_weight_only(scheme: Scheme, n: int, k: int) -> None:
    weight = random_weight(scheme, n, k)
    x, bias = torch.randn(11, k), torch.randn(n)
    layer = CpuLinear(weight, bias, activations="float")
    error = relative_error(layer(x), x.double() @ weight.dequantize(torch.float64).T + bias)
    assert error < FLOAT_TOLERANCE, f"{scheme}: {error}"
    assert torch.equal(layer(x[4:5]), layer(x)[4:5])


@pytest.mark.parametrize("dtype", DENSE, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (37, 70), (64, 128), (16, 15)])
def test_dense_weights(instruction_set: str, dtype: torch.dtype, n: int, k: int) -> None:
    check_weight_only(DenseScheme(dtype), n, k)


@pytest.mark.parametrize("scheme", FLOAT8, ids=str)
def test_fp8_weights(instruction_set: str, scheme: FloatScheme) -> None:
    check_weight_only(scheme, 70, 200)


def test_all_fp8_codes_are_read(instruction_set: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)
    weight = QuantizedWeight(FloatScheme("tensor"), {"codes": codes, "scales": torch.tensor(1.0)}, (16, 16))
    found = CpuLinear(weight, None, activations="float")(torch.eye(16))  # output n, row k: code 16 n + k
    with_nan = torch.tensor([n in (7, 15) for n in range(16)])  # codes 0x7f and 0xff
    assert found[:, with_nan].isnan().all()
    assert torch.equal(found[:, ~with_nan], codes.float().T[:, ~with_nan])


@pytest.mark.parametrize("scheme", KQUANTS, ids=str)
def test_kquant_weights(instruction_set: str, scheme: KQuantScheme) -> None:
    check_weight_only(scheme, 20, 512)


@pytest.mark.parametrize("scheme", LOOKUPS, ids=str)
def test_lookup_weights(instruction_set: str, scheme: LookupScheme) -> None:
    check_weight_only(scheme, 24, 192)
    check_weight_only(scheme, 48, 200 - 200 % scheme.block_size)


@pytest.mark.parametrize("scheme", AFFINES, ids=str)
def test_affine_weights(instruction_set: str, scheme: AffineScheme) -> None:
    check_weight_only(scheme, 32, 192)


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_inputs_are_quantized_as_the_scheme_says(instruction_set: str, inputs: ActivationScheme, kind: str) -> None:
    if kind == "int8":
        scheme: Scheme = IntegerScheme(8, None, True, activations=inputs)
    else:
        scheme = FloatScheme("channel", activations=inputs)
    n, k = 40, 300
    weight = random_weight(scheme, n, k)
    x = torch.randn(7, k) * torch.rand(7, 1) * 3
    rounded = quantize_dequantize(x, inputs, weight.tensors.get("input_scale"))
    for activations in ("int8", "float"):  # is about schemes that say nothing of inputs
        layer = CpuLinear(weight, None, activations=activations)
        error = relative_error(layer(x), rounded.double() @ weight.dequantize(torch.float64).T)
        assert error < FLOAT_TOLERANCE, f"{error}"
        assert torch.equal(layer(x[2:3]), layer(x)[2:3])


def test_a_nan_input_of_a_quantized_scheme_stays_in_its_row(instruction_set: str) -> None:
    for inputs in INPUTS:
        layer = CpuLinear(
            random_weight(IntegerScheme(8, None, True, activations=inputs), 40, 96), None, activations="int8"
        )
        x = torch.randn(5, 96)
        dirty = x.clone()
        dirty[3, 50] = torch.nan
        others = [0, 1, 2, 4]
        assert torch.equal(layer(dirty)[others], layer(x)[others])
        assert layer(dirty)[3].isnan().all()
