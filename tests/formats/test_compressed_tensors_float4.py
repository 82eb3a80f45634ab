"""compressed-tensors NVFP4 and MXFP4: the library writes the same, and ModelOpt's and gpt-oss's weights fit in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.errors import InputError, UsageError
from aphroquant.formats.base import Format
from aphroquant.formats.compressed_tensors import CompressedTensors
from aphroquant.formats.modelopt import ModelOpt
from aphroquant.formats.mxfp4 import Mxfp4
from aphroquant.formats.reading import headers_of
from aphroquant.schemes import ActivationScheme, DenseScheme, FloatScheme, LookupScheme, QuantizedWeight, Scheme

P = "model.layers.0.mlp.up_proj"
EXPERT = "model.layers.0.mlp.experts.0.down_proj"
NVFP4_INPUTS = ActivationScheme("float", 4, granularity="group", group_size=16)
NVFP4 = LookupScheme("e2m1", 16, "e4m3", activations=NVFP4_INPUTS)
NVFP4A16 = LookupScheme("e2m1", 16, "e4m3")
MXFP4 = LookupScheme("e2m1", 32, "e8m0", activations=ActivationScheme("float", 4, granularity="group", group_size=32))
MXFP4A16 = LookupScheme("e2m1", 32, "e8m0")
MXFP4_FP8 = LookupScheme(
    "e2m1", 32, "e8m0", activations=ActivationScheme("float", 8, granularity="group", group_size=128)
)
PRESETS = {"NVFP4": NVFP4, "NVFP4A16": NVFP4A16, "MXFP4": MXFP4, "MXFP4A16": MXFP4A16, "MXFP4XFP8": MXFP4_FP8}


def library(preset: str) -> tuple[Any, Any, dict[str, Any]]:
    """The library's compressor, its scheme, and the quantization_config that it would write."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    stored = "nvfp4-pack-quantized" if preset.startswith("NV") else "mxfp4-pack-quantized"
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=stored, ignore=["lm_head"])
    return BaseCompressor.get_value_from_registry(stored), scheme, json.loads(config.model_dump_json())


def library_tensors(preset: str, dense: Tensor) -> dict[str, Tensor]:
    """What the library stores, with scales and a global scale such as its observers find."""
    compressor, scheme, _ = library(preset)
    blocks = dense.unflatten(1, (-1, 16 if preset.startswith("NV") else 32)).abs().amax(2)
    if preset.startswith("MX"):
        state = {"weight": dense, "weight_scale": torch.exp2(blocks.log2().floor() - 2)}
        return dict(compressor.compress(state, scheme))
    divisor = (448 * 6 / dense.abs().max()).reshape(1)
    scales = (blocks / 6 * divisor).to(torch.float8_e4m3fn)
    state = {"weight": dense, "weight_scale": scales.float(), "weight_global_scale": divisor}
    found: dict[str, Tensor] = compressor.compress(state, scheme)
    return found | ({"input_global_scale": torch.tensor([77.7])} if preset == "NVFP4" else {})


def float4_weight(scheme: LookupScheme, n: int = 8, k: int = 64) -> QuantizedWeight:
    """Global scales are a float32 divided by none, and one that is."""
    shape = scheme.shapes(n, k)["scales"]
    scales = torch.rand(shape).mul(400).to(torch.float8_e4m3fn)
    if scheme.scales == "e8m0":
        scales = torch.randint(100, 140, shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors = {"codes": torch.randint(0, 16, (n, k), dtype=torch.uint8), "scales": scales}
    if scheme.scales == "e4m3":
        tensors["global_scale"] = torch.tensor(0.0123).double()
    if scheme.has_input_scale:
        tensors["input_scale"] = 1 / torch.tensor(77.7).double()
    return QuantizedWeight(scheme, tensors, (n, k))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_library_s_tensors_are_read_bit_for_bit_and_written_byte_for_byte(
    preset: str, reread: Callable[[Format], Format]
) -> None:
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    compressor, scheme, config = library(preset)
    tensors = library_tensors(preset, torch.randn(24, 192))
    weight = CompressedTensors.from_config(config).read(P, tensors)
    weight.check(P)
    assert weight.scheme == PRESETS[preset]
    assert torch.equal(weight.dequantize(torch.bfloat16), compressor.decompress(dict(tensors), scheme)["weight"])
    exact = dequantize(
        weight.scheme.table_values()[weight["codes"].int()],  # type: ignore[union-attr]
        weight["scales"].float(),
        args=scheme.weights,
        global_scale=tensors.get("weight_global_scale"),
        dtype=torch.float32,
    )
    assert torch.equal(weight.dequantize(), exact)

    written = CompressedTensors.for_schemes({P: weight.scheme}, [])
    again = written.write(P, weight)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].float(), tensor.float()), name
    assert torch.equal(reread(written).read(P, again).dequantize(), weight.dequantize())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_library_understands_the_written_config(preset: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    _, scheme, theirs = library(preset)
    ours = CompressedTensors.for_schemes({P: PRESETS[preset]}, ["lm_head"]).quantization_config()
    assert ours["format"] == theirs["format"]
    found = QuantizationConfig.model_validate(ours).config_groups["group_0"]
    assert (found.weights.scale_dtype, found.weights.zp_dtype) == (scheme.weights.scale_dtype, scheme.weights.zp_dtype)
    for name in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic"):
        assert getattr(found.weights, name) == getattr(scheme.weights, name), name
        if scheme.input_activations is not None:
            assert getattr(found.input_activations, name) == getattr(scheme.input_activations, name), name


@pytest.mark.parametrize("preset", ["NVFP4A16", "MXFP4A16"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_what_is_written(preset: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = open_checkpoint(tiny_checkpoint("llama"))
    modules = [module for module in source.schemes() if "proj" in module]
    format = CompressedTensors.for_schemes(dict.fromkeys(modules, PRESETS[preset]), [])
    reader = CompressedTensors.from_config(library(preset)[2])
    with CheckpointWriter(tmp_path / "ours") as writer:
        for name in source.tensors:
            if name.removesuffix(".weight") not in modules:
                writer.add(name, source.read(name))
        for module in modules:
            weight = reader.read(module, library_tensors(preset, source.read(f"{module}.weight")))
            for suffix, tensor in format.write(module, weight).items():
                writer.add(f"{module}.{suffix}", tensor)
        writer.finish(source.config | {"quantization_config": format.quantization_config()})
    options = CompressedTensorsConfig(run_compressed=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16, quantization_config=options)
    ours = open_checkpoint(tmp_path / "ours")
    quantized = {module for module, scheme in ours.schemes().items() if not isinstance(scheme, DenseScheme)}
    assert quantized == set(modules)
    for module in modules:
        theirs = loaded.get_submodule(module).weight
        assert torch.equal(theirs, ours.weight(module).dequantize(torch.bfloat16)), module


@pytest.mark.parametrize("scheme", [NVFP4, NVFP4A16], ids=str)
def test_repacking_for_modelopt_keeps_codes_and_block_scales_and_rounds_the_global_scale_once(
    scheme: LookupScheme,
) -> None:
    weight = float4_weight(scheme)
    ours, theirs = CompressedTensors.for_schemes({P: scheme}, []), ModelOpt.for_schemes({P: scheme}, [])
    through = ours.read(P, ours.write(P, theirs.read(P, theirs.write(P, weight))))
    assert torch.equal(through["codes"], weight["codes"])
    assert torch.equal(through["scales"].float(), weight["scales"].float())
    torch.testing.assert_close(through["global_scale"], weight["global_scale"], rtol=2**-24, atol=0)
    torch.testing.assert_close(through.dequantize(), weight.dequantize(), rtol=2**-22, atol=0)
    for target in (ours, theirs):
        assert target.read(P, target.write(P, weight)).same_values(weight)


@pytest.mark.parametrize("exponent", [-20, -1, 0, 9])
def test_repacking_for_modelopt_is_bit_equal_if_the_global_scale_is_a_power_of_two(exponent: int) -> None:
    weight = float4_weight(NVFP4A16)
    tensors = {**weight.tensors, "global_scale": torch.tensor(2.0**exponent, dtype=torch.float64)}
    weight = QuantizedWeight(NVFP4A16, tensors, weight.shape)
    for target in (CompressedTensors.for_schemes({P: NVFP4A16}, []), ModelOpt.for_schemes({P: NVFP4A16}, [])):
        assert torch.equal(target.read(P, target.write(P, weight)).dequantize(), weight.dequantize())


def test_repacking_experts_of_gpt_oss_is_bit_equal() -> None:
    gpt_oss, ours = Mxfp4.for_schemes({EXPERT: MXFP4A16}, []), CompressedTensors.for_schemes({EXPERT: MXFP4A16}, [])
    tensors = {
        "blocks": torch.randint(0, 256, (4, 2, 16), dtype=torch.uint8),
        "scales": torch.arange(247, 255, dtype=torch.uint8).reshape(4, 2),
    }
    weight = gpt_oss.read(EXPERT, tensors)
    read = ours.read(EXPERT, ours.write(EXPERT, weight))
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert torch.equal(gpt_oss.write(EXPERT, read)["blocks"], tensors["blocks"])
    assert torch.equal(gpt_oss.write(EXPERT, read)["scales"], tensors["scales"])


def test_four_bit_floats_and_fp8_are_mixed_by_module(reread: Callable[[Format], Format]) -> None:
    schemes: dict[str, Scheme] = {
        P: NVFP4,
        EXPERT: MXFP4A16,
        "model.layers.0.self_attn.q_proj": FloatScheme("channel", activations=ActivationScheme("float")),
    }
    written = CompressedTensors.for_schemes(schemes, [])
    config = written.quantization_config()
    assert config["format"] == "mixed-precision"
    formats = [group["format"] for group in config["config_groups"].values()]
    assert formats == ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized"]
    for module, scheme in ((P, NVFP4), (EXPERT, MXFP4A16)):
        weight = float4_weight(scheme)
        read = reread(written).read(module, written.write(module, weight))
        assert read.scheme == scheme
        assert torch.equal(read["codes"], weight["codes"])


@pytest.mark.parametrize(
    ("scheme", "name", "change", "message"),
    [
        (NVFP4, "weight_packed", lambda t: t.int(), "weight_packed has dtype int32"),
        (NVFP4, "weight_packed", lambda t: t[:, :-1], "in_features = 62 is no multiple of the block size 16"),
        (NVFP4, "weight_scale", lambda t: t[:, 1:], r"weight_scale has shape \[8, 3\]"),
        (NVFP4, "weight_scale", lambda t: t.view(torch.uint8), "weight_scale has dtype uint8"),
        (NVFP4, "weight_global_scale", lambda t: t.repeat(2), r"weight_global_scale has shape \[2\]"),
        (NVFP4, "weight_global_scale", lambda t: t * 0, "weight_global_scale = 0.0 must be positive"),
        (NVFP4, "input_global_scale", lambda t: -t, "input_global_scale = -.* must be positive"),
        (MXFP4, "weight_scale", lambda t: t.float(), "weight_scale has dtype float32"),
        (MXFP4, "weight_scale", lambda t: t[1:], r"weight_scale has shape \[7, 2\]"),
    ],
)
def test_malformed_tensors_are_told_by_name(
    scheme: LookupScheme, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    format = CompressedTensors.for_schemes({P: scheme}, [])
    tensors = format.write(P, float4_weight(scheme))
    with pytest.raises(InputError, match=message) as raised:
        format.read(P, {**tensors, name: change(tensors[name])})
    assert P in str(raised.value)


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"])
def test_missing_tensors_are_told_by_name(name: str) -> None:
    format = CompressedTensors.for_schemes({P: NVFP4}, [])
    tensors = format.write(P, float4_weight(NVFP4))
    del tensors[name]
    with pytest.raises(InputError, match=f"the tensor {name} is missing"):
        format.scheme(P, headers_of(tensors))


@pytest.mark.parametrize(
    ("preset", "part", "changes"),
    [
        ("NVFP4", "weights", {"group_size": 32}),
        ("NVFP4", "weights", {"strategy": "group"}),
        ("NVFP4", "weights", {"symmetric": False}),
        ("NVFP4", "weights", {"dynamic": "local"}),
        ("NVFP4", "input_activations", {"group_size": 32}),
        ("NVFP4", "input_activations", {"dynamic": False}),
        ("MXFP4", "weights", {"num_bits": 8}),
        ("MXFP4", "input_activations", {"dynamic": "local"}),
        ("MXFP4", "input_activations", {"dynamic": False, "strategy": "tensor", "group_size": None}),
    ],
    ids=str,
)
def test_other_kinds_of_four_bit_floats_are_refused(preset: str, part: str, changes: dict[str, Any]) -> None:
    config = library(preset)[2]
    config["config_groups"]["group_0"][part] |= changes
    with pytest.raises(InputError, match="quantization_config: group_0"):
        CompressedTensors.from_config(config)


@pytest.mark.parametrize(
    "scheme",
    [
        LookupScheme("e2m1", 32, "e4m3"),
        LookupScheme("e2m1", 16, "e8m0"),
        LookupScheme("nf4", 64, "float", flattened=True),
        LookupScheme("e2m1", 16, "e4m3", activations=ActivationScheme("float", 4)),
        LookupScheme("e2m1", 32, "e8m0", activations=ActivationScheme("float", dynamic=False, granularity="tensor")),
    ],
    ids=str,
)
def test_schemes_that_it_cannot_hold_are_refused(scheme: Scheme) -> None:
    with pytest.raises(UsageError, match="compressed-tensors cannot hold"):
        CompressedTensors.for_schemes({P: scheme}, [])
