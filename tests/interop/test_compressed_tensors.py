"""What we write, the compressed-tensors library decompresses to the same bits, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from aphroquant.formats.compressed_tensors import CompressedTensors
from aphroquant.schemes import ActivationScheme, FloatScheme, IntegerScheme, QuantizedWeight, Scheme

P = "model.layers.0.mlp.up_proj"
Quantizer = Callable[[torch.Tensor, Scheme], QuantizedWeight]
INT8_INPUTS, FP8_INPUTS = ActivationScheme("int"), ActivationScheme("float")
STATIC_INPUTS = ActivationScheme("float", dynamic=False, granularity="tensor")
BLOCK_INPUTS = ActivationScheme("float", granularity="group", group_size=128)
SCHEMES = [
    *(IntegerScheme(bits, 32, symmetric) for bits in range(2, 9) for symmetric in (True, False)),
    IntegerScheme(4, None, symmetric=False),
    IntegerScheme(8, None, symmetric=True, activations=INT8_INPUTS),
    IntegerScheme(8, None, symmetric=False, activations=INT8_INPUTS),
    IntegerScheme(4, 64, symmetric=True, activations=INT8_INPUTS),
    FloatScheme("tensor", activations=STATIC_INPUTS),
    FloatScheme("channel", activations=FP8_INPUTS),
    FloatScheme("block", (128, 128), BLOCK_INPUTS),
    FloatScheme("block", (1, 64), ActivationScheme("float", granularity="group", group_size=64)),
]


def library_view(target: CompressedTensors) -> tuple[type[BaseCompressor], QuantizationScheme]:
    """The library's compressor and its scheme, as it reads them from our config."""
    config = QuantizationConfig.model_validate(target.quantization_config())
    (scheme,) = config.config_groups.values()
    assert isinstance(scheme, QuantizationScheme)
    return BaseCompressor.get_value_from_registry(scheme.format or config.format), scheme


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_library_decompresses_what_we_write(
    scheme: Scheme, dtype: torch.dtype, round_to_nearest: Quantizer
) -> None:
    weight = round_to_nearest(torch.randn(96, 192) * 0.05, scheme)
    weight = QuantizedWeight(scheme, {**weight.tensors, "scales": weight["scales"].to(dtype)}, weight.shape)
    target = CompressedTensors.for_schemes({P: scheme}, [])
    compressor, their_scheme = library_view(target)
    theirs = compressor.decompress(target.write(P, weight), their_scheme)["weight"]
    assert torch.equal(theirs, weight.dequantize(dtype))  # the library computes in the dtype of the scales


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_we_read_what_the_library_writes(scheme: Scheme, round_to_nearest: Quantizer) -> None:
    dense = torch.randn(96, 192) * 0.05
    tensors = round_to_nearest(dense, scheme).tensors  # for the scales and zero points
    target = CompressedTensors.for_schemes({P: scheme}, [])
    compressor, their_scheme = library_view(target)
    state: dict[str, Any] = {"weight": dense, "weight_scale": tensors["scales"].float()}
    if "zeros" in tensors:
        assert isinstance(scheme, IntegerScheme)
        state["weight_zero_point"] = (tensors["zeros"].int() - 2 ** (scheme.bits - 1)).to(torch.int8)
    if "input_scale" in tensors:
        state["input_scale"] = tensors["input_scale"].reshape(1)
    stored = compressor.compress(state, their_scheme)
    read = target.read(P, stored)
    assert read.scheme == scheme
    assert torch.equal(read.dequantize(), compressor.decompress(stored, their_scheme)["weight"])
    written = target.write(P, read)
    assert written.keys() == stored.keys()
    for name, tensor in written.items():
        same_view = torch.uint8 if tensor.dtype == torch.float8_e4m3fn else tensor.dtype
        expected = stored[name].reshape(tensor.shape)
        assert torch.equal(tensor.view(same_view), expected.view(same_view)), name


def test_the_library_accepts_a_config_of_mixed_schemes() -> None:
    schemes: dict[str, Scheme] = {"a": SCHEMES[0], "b": SCHEMES[1], "c": FloatScheme("channel", activations=FP8_INPUTS)}
    config = QuantizationConfig.model_validate(CompressedTensors.for_schemes(schemes, []).quantization_config())
    assert config.format == "mixed-precision"
    assert [getattr(group, "format", None) for group in config.config_groups.values()] == [
        "pack-quantized",
        "pack-quantized",
        "float-quantized",
    ]
