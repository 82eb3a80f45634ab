"""transformers loads what we write and computes the logits of the dequantized model, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from aphroquant.formats.compressed_tensors import CompressedTensors
from aphroquant.formats.fp8 import Fp8
from aphroquant.schemes import ActivationScheme, FloatScheme, IntegerScheme, Scheme

QuantizedCheckpoint = Callable[..., Any]
TOLERANCE = 1e-5  # logits are near 5; the largest difference seen is 0
INT8_INPUTS, FP8_INPUTS = ActivationScheme("int"), ActivationScheme("float")
STATIC_INPUTS = ActivationScheme("float", dynamic=False, granularity="tensor")
BLOCK_INPUTS = ActivationScheme("float", granularity="group", group_size=128)
W4, W4_ASYM = IntegerScheme(4, 32, symmetric=True), IntegerScheme(4, 32, symmetric=False)
W8A8 = IntegerScheme(8, None, symmetric=True, activations=INT8_INPUTS)
FP8_STATIC = FloatScheme("tensor", activations=STATIC_INPUTS)
FP8_DYNAMIC = FloatScheme("channel", activations=FP8_INPUTS)
FP8_BLOCK = FloatScheme("block", (128, 128), BLOCK_INPUTS)

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


def logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(token_ids).logits
    assert found.dtype == torch.float32
    return found


def assert_same_logits(loaded: Any, checkpoint: Any) -> None:
    expected = logits(checkpoint.dense_model, checkpoint.token_ids)
    difference = float((logits(loaded, checkpoint.token_ids) - expected).abs().max())
    assert difference <= TOLERANCE, f"logits differ by up to {difference}, of up to {float(expected.abs().max())}"


@pytest.mark.parametrize("scheme", [W4, IntegerScheme(8, None, symmetric=True)], ids=str)
def test_packed_integers_load_compressed(scheme: Scheme, quantized_checkpoint: QuantizedCheckpoint) -> None:
    checkpoint = quantized_checkpoint(CompressedTensors, lambda module: scheme)
    assert_same_logits(AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32), checkpoint)


@pytest.mark.parametrize("scheme", [W4, W4_ASYM, W8A8, FP8_STATIC, FP8_DYNAMIC, FP8_BLOCK], ids=str)
def test_every_layout_loads_dequantized(scheme: Scheme, quantized_checkpoint: QuantizedCheckpoint) -> None:
    """Asymmetric packed weights load only so: compressed-tensors 0.20 expects unpacked zero points otherwise."""
    rounded_to = torch.float16 if isinstance(scheme, IntegerScheme) else torch.float32  # the dtype of our scales
    checkpoint = quantized_checkpoint(CompressedTensors, lambda module: scheme, rounded_to)
    options = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, quantization_config=options)
    assert_same_logits(loaded, checkpoint)


@pytest.mark.parametrize("scheme", [W8A8, FP8_STATIC, FP8_DYNAMIC], ids=str)
def test_inputs_are_quantized_as_the_config_says(scheme: Any, quantized_checkpoint: QuantizedCheckpoint) -> None:
    checkpoint = quantized_checkpoint(CompressedTensors, lambda module: scheme)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    for name, module in checkpoint.dense_model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, inputs: (quantized_input(inputs[0], scheme.activations),))
    assert_same_logits(loaded, checkpoint)


def quantized_input(hidden: torch.Tensor, activations: ActivationScheme) -> torch.Tensor:
    largest = hidden.abs().amax(-1, keepdim=True)
    if activations.kind == "int":
        scale = largest / 127.5
        return (hidden / scale).round().clamp(-128, 127) * scale
    scale = largest / 448 if activations.dynamic else torch.tensor(0.05)
    return (hidden / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def test_mixed_schemes_load_by_their_groups(quantized_checkpoint: QuantizedCheckpoint) -> None:
    """Attention in 8 bits per channel, one projection in 3 bits, the rest in 4."""

    def scheme_of(module: str) -> Scheme:
        if "self_attn" in module:
            return IntegerScheme(8, None, symmetric=True)
        return IntegerScheme(3, 64, symmetric=True) if module.endswith("down_proj") else W4

    checkpoint = quantized_checkpoint(CompressedTensors, scheme_of)
    assert_same_logits(AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32), checkpoint)


def test_fp8_blocks_load_as_fine_grained_fp8(quantized_checkpoint: QuantizedCheckpoint) -> None:
    """Without a GPU, transformers dequantizes while loading."""
    checkpoint = quantized_checkpoint(Fp8, lambda module: FP8_BLOCK)
    assert_same_logits(AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32), checkpoint)
