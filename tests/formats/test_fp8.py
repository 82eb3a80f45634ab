"""FP8 per tensor and in blocks: the sentences of its specification, judged by an independent dequantizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from aphroquant.errors import InputError, UsageError
from aphroquant.formats.base import TensorHeader
from aphroquant.formats.fp8 import Fp8
from aphroquant.schemes import ActivationScheme, FloatScheme, IntegerScheme, QuantizedWeight

Fixture = Callable[..., Any]
P = "model.layers.0.mlp.up_proj"
STATIC = FloatScheme("tensor", activations=ActivationScheme("float", dynamic=False, granularity="tensor"))
DYNAMIC = FloatScheme("tensor", activations=ActivationScheme("float"))
BLOCK = FloatScheme("block", (128, 128), ActivationScheme("float", granularity="group", group_size=128))
BLOCK_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def e4m3(byte: int) -> float:
    """The number of an FP8 e4m3fn byte, from its sign, exponent and mantissa."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3(byte) for byte in range(256)], np.float32)


def dequantized(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    values = E4M3[tensors["weight"].view(torch.uint8).numpy()]
    if "weight_scale" in tensors:
        return values * np.float32(tensors["weight_scale"])
    scales = tensors["weight_scale_inv"].numpy()
    weight = np.empty_like(values)
    for n in range(values.shape[0]):
        for k in range(values.shape[1]):
            weight[n, k] = values[n, k] * scales[n // 128, k // 128]
    return weight


def float_weight(scheme: FloatScheme, n: int, k: int) -> QuantizedWeight:
    codes = torch.randn(n, k).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = {"tensor": (), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}[scheme.granularity]
    tensors = {"codes": codes, "scales": torch.rand(shape) * 0.01}
    if scheme.activations and not scheme.activations.dynamic:
        tensors["input_scale"] = torch.tensor(0.37)
    return QuantizedWeight(scheme, tensors, (n, k))


def headers(shape: tuple[int, int], scale: str, scale_shape: tuple[int, ...], **more: TensorHeader) -> dict[str, Any]:
    return {
        "weight": TensorHeader(torch.float8_e4m3fn, shape),
        scale: TensorHeader(torch.float32, scale_shape),
        **more,
    }


@pytest.mark.parametrize("scheme", [STATIC, DYNAMIC, BLOCK], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (128, 256), (130, 129)])
def test_what_is_written_reads_back_bit_equal(scheme: FloatScheme, shape: tuple[int, int], reread: Fixture) -> None:
    target = Fp8.for_schemes({P: scheme}, [])
    weight = float_weight(scheme, *shape)
    tensors = target.write(P, weight)
    read = reread(target).read(P, tensors)
    assert read.scheme == scheme
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert np.array_equal(dequantized(tensors), weight.dequantize().numpy())
    assert read.tensors.keys() == weight.tensors.keys()
    assert tensors.get("input_scale", torch.tensor(0.37)).item() == pytest.approx(0.37)


def test_the_configs_are_what_the_field_writes() -> None:
    assert Fp8.for_schemes({P: DYNAMIC}, ["lm_head"]).quantization_config() == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": ["lm_head"],
    }
    assert Fp8.for_schemes({P: STATIC}, []).quantization_config()["activation_scheme"] == "static"
    assert Fp8.for_schemes({P: BLOCK}, ["lm_head"]).quantization_config() == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }


def test_a_tied_lm_head_is_ignored_and_a_quantized_one_is_not() -> None:
    assert Fp8.for_schemes({P: BLOCK}, []).ignored_layers == ("lm_head",)
    assert Fp8.for_schemes({P: BLOCK, "lm_head": BLOCK}, []).ignored_layers == ()


def test_names_and_dtypes_are_those_of_the_layout() -> None:
    tensors = Fp8.for_schemes({P: STATIC}, []).write(P, float_weight(STATIC, 4, 6))
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert found == {
        "weight": (torch.float8_e4m3fn, (4, 6)),
        "weight_scale": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    }
    tensors = Fp8.for_schemes({P: BLOCK}, []).write(P, float_weight(BLOCK, 130, 257))
    assert tensors["weight_scale_inv"].shape == (2, 3)


@pytest.mark.parametrize("padding", [0.0, 1.0])
def test_scale_grids_may_be_padded(padding: float) -> None:
    weight = float_weight(BLOCK, 130, 257)
    tensors = Fp8.for_schemes({P: BLOCK}, []).write(P, weight)
    grid = torch.full((4, 4), padding)
    grid[:2, :3] = tensors["weight_scale_inv"]
    read = Fp8.from_config(BLOCK_CONFIG).read(P, {**tensors, "weight_scale_inv": grid})
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert read["scales"].shape == (2, 3)


def test_a_grid_of_smaller_blocks_is_no_padding() -> None:
    tensors = Fp8.for_schemes({P: BLOCK}, []).write(P, float_weight(BLOCK, 256, 256))
    with pytest.raises(InputError, match=r"weight_scale_inv has shape \[4, 4\], but the weight has 2 x 2 blocks"):
        Fp8.from_config(BLOCK_CONFIG).read(P, {**tensors, "weight_scale_inv": torch.rand(4, 4)})


@pytest.mark.parametrize("name", ["weight_scale_inv", "scale"])
def test_scales_that_are_powers_of_two_are_read_in_every_storage(name: str) -> None:
    config = {**BLOCK_CONFIG, "scale_fmt": "ue8m0"}
    exponents = torch.tensor([[-3, 0, 5], [-120, 2, 100]])
    codes = float_weight(BLOCK, 130, 257)["codes"]
    expected = torch.exp2(exponents.double()).float()
    for stored in (expected, expected.to(torch.float8_e8m0fnu), (exponents + 127).to(torch.uint8)):
        read = Fp8.from_config(config).read(P, {"weight": codes, name: stored})
        assert torch.equal(read["scales"], expected)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_of_a_tensor_may_have_one_dimension(shape: tuple[int, ...]) -> None:
    static = {"quant_method": "fp8", "activation_scheme": "static"}
    found = headers((8, 4), "weight_scale", shape, input_scale=TensorHeader(torch.float32, shape))
    assert Fp8.from_config(static).scheme(P, found) == STATIC


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
def test_scales_per_channel_are_read_but_not_written(shape: tuple[int, ...]) -> None:
    channel = FloatScheme("channel", activations=ActivationScheme("float"))
    assert Fp8.from_config({"quant_method": "fp8"}).scheme(P, headers((8, 4), "weight_scale", shape)) == channel
    with pytest.raises(UsageError, match="fp8 cannot hold one scale a channel"):
        Fp8.for_schemes({P: channel}, [])


def test_the_names_that_transformers_gives_scales_of_a_tensor_are_read() -> None:
    found = headers((8, 4), "weight_scale_inv", (), activation_scale=TensorHeader(torch.float32, ()))
    assert Fp8.from_config({"quant_method": "fp8", "activation_scheme": "static"}).scheme(P, found) == STATIC


def test_modules_without_fp8_codes_are_dense() -> None:
    assert Fp8.from_config(BLOCK_CONFIG).scheme(P, {"weight": TensorHeader(torch.bfloat16, (8, 4))}) is None


@pytest.mark.parametrize(
    ("config", "found", "message"),
    [
        (BLOCK_CONFIG, {"weight": TensorHeader(torch.float8_e4m3fn, (8, 4))}, "no weight_scale_inv or weight_scale"),
        (BLOCK_CONFIG, headers((256, 256), "weight_scale_inv", (1, 2)), r"has shape \[1, 2\].* blocks of \[128, 128\]"),
        ({"quant_method": "fp8"}, headers((8, 4), "weight_scale", (3,)), "needs one scale for a tensor or a row"),
        (BLOCK_CONFIG, headers((8,), "weight_scale_inv", (1, 1)), "must be a matrix"),  # type: ignore[arg-type]
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            headers((8, 4), "weight_scale", ()),
            "no input_scale or activation_scale",
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            headers((8, 4), "weight_scale", (), input_scale=TensorHeader(torch.float32, (4,))),
            r"input_scale has shape \[4\], but must be one number",
        ),
    ],
)
def test_malformed_tensors_are_named(config: dict[str, Any], found: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"{P}.*{message}"):
        Fp8.from_config(config).scheme(P, found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_scheme": "token"}, "activation_scheme 'token' must be 'static' or 'dynamic'"),
        ({"weight_block_size": [128]}, r"weight_block_size = \[128\] must be two positive integers"),
        ({"weight_block_size": [128, 0]}, "must be two positive integers"),
        ({"fmt": "e5m2"}, "fmt 'e5m2' are not readable"),
    ],
)
def test_malformed_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Fp8.from_config({**BLOCK_CONFIG, **changes})


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (IntegerScheme(4, 32, symmetric=True), "fp8 holds 8-bit floats, not int4"),
        (FloatScheme("tensor"), "fp8 always quantizes the inputs"),
        (FloatScheme("tensor", activations=ActivationScheme("int")), "cannot hold inputs quantized as"),
        (FloatScheme("block", (128, 128), STATIC.activations), "cannot hold inputs quantized as"),
    ],
)
def test_schemes_it_cannot_hold_are_refused_with_the_reason(scheme: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Fp8.for_schemes({P: scheme}, [])


def test_one_scheme_for_all_modules() -> None:
    with pytest.raises(UsageError, match=r"fp8 has one scheme for all modules, but a has .* and b"):
        Fp8.for_schemes({"a": STATIC, "b": DYNAMIC}, [])


def test_bfloat16_scales_are_written_as_float32() -> None:
    weight = float_weight(DYNAMIC, 4, 4)
    weight = QuantizedWeight(DYNAMIC, {**weight.tensors, "scales": weight["scales"].bfloat16()}, (4, 4))
    tensors = Fp8.for_schemes({P: DYNAMIC}, []).write(P, weight)
    assert tensors["weight_scale"].dtype == torch.float32
    assert np.array_equal(dequantized(tensors), weight.dequantize().numpy())
