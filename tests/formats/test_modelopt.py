"""ModelOpt checkpoints, judged by what the library itself exported and dequantized: see data/make_modelopt.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import InputError, UsageError
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.formats.modelopt import FP4_INPUTS, NAMES, STATIC_INPUTS, ModelOpt
from aphroquant.formats.reading import headers_of
from aphroquant.schemes import (
    ActivationScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)

DATA = Path(__file__).parent / "data"
CONFIGS: dict[str, dict[str, Any]] = json.loads((DATA / "modelopt.json").read_text())
MODULE = "model.layers.0.mlp.down_proj"
OTHER = "model.layers.0.mlp.up_proj"
EXPECTED: dict[str, Scheme] = {
    "FP8": FloatScheme("tensor", activations=STATIC_INPUTS),
    "FP8_PER_CHANNEL_PER_TOKEN": FloatScheme("channel", activations=ActivationScheme("float")),
    "NVFP4": LookupScheme("e2m1", 16, "e4m3", activations=FP4_INPUTS),
    "W4A16_NVFP4": LookupScheme("e2m1", 16, "e4m3"),
}


@pytest.fixture(scope="module")
def exported() -> dict[str, Tensor]:
    return load_file(DATA / "modelopt.safetensors")


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, exported: dict[str, Tensor], tmp_path: Path) -> Path:
    """The directory that the library exported with the algorithm that is the parameter."""
    prefix = f"{request.param}/"
    tensors = {name.removeprefix(prefix): tensor for name, tensor in exported.items() if name.startswith(prefix)}
    stored = {name: tensor for name, tensor in tensors.items() if not name.endswith(".dequantized")}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    for name, content in CONFIGS[request.param].items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def tensors_of(exported: dict[str, Tensor], algorithm: str, module: str = MODULE) -> dict[str, Tensor]:
    prefix = f"{algorithm}/{module}."
    found = {name.removeprefix(prefix): tensor for name, tensor in exported.items() if name.startswith(prefix)}
    found.pop("dequantized", None)
    return found


def format_of(algorithm: str, **changes: Any) -> ModelOpt:
    return ModelOpt.from_config(CONFIGS[algorithm]["config.json"]["quantization_config"] | changes)


@pytest.mark.parametrize("checkpoint", NAMES, indirect=True)
def test_an_exported_checkpoint_is_read_and_written_again_byte_for_byte(
    checkpoint: Path, exported: dict[str, Tensor], reread: Callable[[Format], Format]
) -> None:
    source = open_checkpoint(checkpoint)
    assert isinstance(source.format, ModelOpt)
    algorithm = source.format.algorithm
    schemes = source.schemes()
    quantized = {module: scheme for module, scheme in schemes.items() if not isinstance(scheme, DenseScheme)}
    assert len(quantized) == 7
    assert set(quantized.values()) == {EXPECTED[algorithm]}
    written = ModelOpt.for_schemes(schemes, [])
    for module in quantized:
        stored = tensors_of(exported, algorithm, module)
        weight = source.weight(module)
        if isinstance(weight.scheme, LookupScheme):
            assert torch.equal(weight.dequantize(), exported[f"{algorithm}/{module}.dequantized"])
        else:
            scale = stored["weight_scale"].reshape(-1, 1)
            assert torch.equal(weight.dequantize(), stored["weight"].float() * scale)
        for suffix in ("k_scale", "v_scale"):
            stored.pop(suffix, None)
        again = written.write(module, weight)
        assert again.keys() == stored.keys()
        for name, tensor in stored.items():
            assert again[name].dtype == tensor.dtype
            assert torch.equal(again[name].float(), tensor.float()), name
        assert torch.equal(reread(written).read(module, again).dequantize(), weight.dequantize())


@pytest.mark.parametrize("checkpoint", NAMES, indirect=True)
def test_the_settings_are_found_in_the_older_file_too(checkpoint: Path) -> None:
    settings = json.loads((checkpoint / "config.json").read_text())
    expected = open_checkpoint(checkpoint).schemes()
    del settings["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(settings))
    assert open_checkpoint(checkpoint).schemes() == expected


@pytest.mark.parametrize("algorithm", NAMES)
def test_the_written_settings_are_the_library_s(algorithm: str) -> None:
    written = ModelOpt.for_schemes({MODULE: EXPECTED[algorithm]}, ["lm_head", "model.embed_tokens"])
    theirs = CONFIGS[algorithm]["config.json"]["quantization_config"]
    theirs.pop("kv_cache_scheme", None)
    assert written.quantization_config() == theirs
    side = written.side_files()["hf_quant_config.json"]
    theirs_side = CONFIGS[algorithm]["hf_quant_config.json"]
    assert side == theirs_side | {"quantization": theirs_side["quantization"] | {"kv_cache_quant_algo": None}}


def test_several_algorithms_are_told_apart_by_layer(
    exported: dict[str, Tensor], reread: Callable[[Format], Format]
) -> None:
    schemes: dict[str, Scheme] = {MODULE: EXPECTED["FP8"], OTHER: EXPECTED["W4A16_NVFP4"]}
    written = ModelOpt.for_schemes(schemes, [])
    config = written.quantization_config()
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"] == {
        MODULE: {"quant_algo": "FP8"},
        OTHER: {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    }
    assert [group["targets"] for group in config["config_groups"].values()] == [[MODULE], [OTHER]]
    sidecar = ModelOpt.from_config({"quant_method": "modelopt", **written.side_files()["hf_quant_config.json"]})
    for module, algorithm in ((MODULE, "FP8"), (OTHER, "W4A16_NVFP4")):
        weight = format_of(algorithm).read(module, tensors_of(exported, algorithm, module))
        tensors = written.write(module, weight)
        for format in (reread(written), sidecar):
            assert format.read(module, tensors).scheme == weight.scheme


def test_a_layer_s_algorithm_may_stand_under_a_part_of_its_name(exported: dict[str, Tensor]) -> None:
    layers = {"model.layers.0": {"quant_algo": "FP8"}, "model.layers.0.mlp": {"quant_algo": "w4a16_nvfp4"}}
    format = ModelOpt.from_config({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    headers = headers_of(tensors_of(exported, "NVFP4"))
    assert format.scheme(MODULE, headers) == EXPECTED["W4A16_NVFP4"]
    assert format.scheme("mtp.layers.0.mlp.up_proj", headers) == EXPECTED["NVFP4"]
    with pytest.raises(
        InputError, match=r"weight is torch\.float8_e4m3fn, although quantization_config says W4A16_NVFP4"
    ):
        format.scheme(MODULE, headers_of(tensors_of(exported, "FP8")))


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_inputs_without_a_scale_are_left_alone(algorithm: str, exported: dict[str, Tensor]) -> None:
    tensors = tensors_of(exported, algorithm)
    del tensors["input_scale"]
    weight = format_of(algorithm).read(MODULE, tensors)
    assert isinstance(weight.scheme, FloatScheme | LookupScheme)
    assert weight.scheme.activations is None
    again = ModelOpt.for_schemes({MODULE: weight.scheme}, []).write(MODULE, weight)
    assert again.keys() == tensors.keys()


def test_a_module_of_floats_is_dense() -> None:
    assert format_of("FP8").scheme("lm_head", {"weight": TensorHeader(torch.bfloat16, (4, 4))}) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_algo": "W4A16_AWQ"},
        {"quant_algo": None},
        {"quant_algo": ["NVFP4"]},
        {"group_size": 32},
        {"quantization": {"quant_algo": "INT8_SQ"}},
        {"quantization": []},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A8_AWQ"}}},
        {"quantized_layers": {"a": "FP8"}},
        {"ignore": "lm_head"},
    ],
    ids=str,
)
def test_settings_that_are_not_readable_are_told(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"quant_algo|group_size|quantization|quantized_layers|ignore"):
        format_of("NVFP4", **changes)


@pytest.mark.parametrize(
    ("algorithm", "name", "change", "message"),
    [
        ("NVFP4", "weight", lambda t: t[0], "weight has shape"),
        ("NVFP4", "weight", lambda t: t[:, :23], "weight_scale has shape|no multiple of the block size"),
        ("NVFP4", "weight", lambda t: t[:, :20], r"in_features = 40 is no multiple of the block size 16"),
        ("NVFP4", "weight_scale", lambda t: t[:, :2], r"weight_scale has shape \[32, 2\]"),
        ("NVFP4", "weight_scale", lambda t: t.float(), "weight_scale has dtype float32"),
        ("NVFP4", "weight_scale_2", lambda t: t.repeat(2), r"weight_scale_2 has shape \[2\], but must be one number"),
        ("NVFP4", "weight_scale_2", lambda t: -t, "weight_scale_2 = -.* must be finite and not negative"),
        ("NVFP4", "weight_scale_2", lambda t: t * torch.nan, "weight_scale_2 = nan must be finite"),
        ("NVFP4", "input_scale", lambda t: t / 0, "input_scale = inf must be finite"),
        ("NVFP4", "input_scale", lambda t: t.int(), "input_scale has dtype int32"),
        ("FP8", "weight_scale", lambda t: t.repeat(3), r"weight_scale has shape \[3\]"),
        ("FP8", "input_scale", lambda t: t.repeat(3), r"input_scale has shape \[3\]"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale", lambda t: t[:-1], r"weight_scale has shape \[31\]"),
    ],
)
def test_malformed_tensors_are_told_by_name(
    algorithm: str, name: str, change: Callable[[Tensor], Tensor], message: str, exported: dict[str, Tensor]
) -> None:
    tensors = tensors_of(exported, algorithm)
    with pytest.raises(InputError, match=message) as raised:
        format_of(algorithm).read(MODULE, {**tensors, name: change(tensors[name])})
    assert MODULE in str(raised.value)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_2"])
def test_missing_tensors_are_told_by_name(name: str, exported: dict[str, Tensor]) -> None:
    tensors = tensors_of(exported, "NVFP4")
    del tensors[name]
    with pytest.raises(InputError, match=f"the tensor {name} is missing"):
        format_of("NVFP4").scheme(MODULE, headers_of(tensors))


def test_layouts_that_change_the_input_or_stack_experts_are_refused(exported: dict[str, Tensor]) -> None:
    tensors = tensors_of(exported, "NVFP4")
    with pytest.raises(InputError, match="scales its input by pre_quant_scale"):
        format_of("NVFP4").scheme(MODULE, headers_of({**tensors, "pre_quant_scale": torch.ones(48)}))
    stacked = {"gate_up_proj": TensorHeader(torch.uint8, (4, 32, 16))}
    with pytest.raises(InputError, match=r"experts\.gate_up_proj is quantized in a way that is not readable"):
        format_of("NVFP4").scheme("model.layers.0.mlp.experts", stacked)


@pytest.mark.parametrize(
    "scheme",
    [
        FloatScheme("tensor", activations=ActivationScheme("float")),
        FloatScheme("block", (128, 128)),
        LookupScheme("e2m1", 32, "e8m0"),
        LookupScheme("e2m1", 16, "e4m3", activations=ActivationScheme("float")),
        IntegerScheme(4, 128, symmetric=True),
    ],
    ids=str,
)
def test_schemes_that_it_cannot_hold_are_refused(scheme: Scheme) -> None:
    with pytest.raises(UsageError, match=r"down_proj: modelopt holds FP8 .*, not"):
        ModelOpt.for_schemes({MODULE: scheme}, [])


def test_a_weight_of_another_scheme_than_announced_is_refused(exported: dict[str, Tensor]) -> None:
    weight = format_of("FP8").read(MODULE, tensors_of(exported, "FP8"))
    with pytest.raises(UsageError, match="was not announced"):
        ModelOpt.for_schemes({MODULE: EXPECTED["NVFP4"]}, []).write(MODULE, weight)
    odd = QuantizedWeight(EXPECTED["W4A16_NVFP4"], {}, (4, 24))
    with pytest.raises(InputError, match="has no codes"):
        ModelOpt.for_schemes({MODULE: odd.scheme}, []).write(MODULE, odd)
