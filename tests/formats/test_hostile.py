"""Whatever stands in a config or a file, reading it ends in a weight or in an InputError, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aphroquant.errors import InputError
from aphroquant.formats import detect_format
from aphroquant.formats.base import TensorHeader

P = "model.layers.0.mlp.up_proj"
ARGUMENTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32, "dynamic": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "sym": False,
        "checkpoint_format": "gptq_v2",
        "dynamic": {"+:nothing": {"bits": 8}},
        "meta": {"static_groups": False},
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*gate"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": ARGUMENTS, "input_activations": {"dynamic": True}}
        },
    },
}
TENSORS: dict[str, dict[str, torch.Tensor]] = {
    "awq": {
        "qweight": torch.ones(64, 2, dtype=torch.int32),
        "qzeros": torch.ones(2, 2, dtype=torch.int32),
        "scales": torch.ones(2, 16).half(),
    },
    "gptq": {
        "qweight": torch.ones(8, 16, dtype=torch.int32),
        "qzeros": torch.ones(2, 2, dtype=torch.int32),
        "scales": torch.ones(2, 16).half(),
        "g_idx": torch.arange(64, dtype=torch.int32) % 2,
    },
    "fp8": {
        "weight": torch.ones(130, 64).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.ones(2, 1),
        "input_scale": torch.ones(1),
    },
    "compressed-tensors": {
        "weight_packed": torch.ones(16, 8, dtype=torch.int32),
        "weight_scale": torch.ones(16, 2).half(),
        "weight_shape": torch.tensor([16, 64]),
        "weight_zero_point": torch.ones(2, 2, dtype=torch.int32),
    },
}
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, -1]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["gemm", "gptq", "group", "channel", "tensor", "block", "float", "int-quantized", "re:(", "128x0"]),
    st.lists(st.integers(-2, 200), max_size=3),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
DTYPES = st.sampled_from([torch.int32, torch.float16, torch.float32, torch.int8, torch.uint8, torch.float8_e4m3fn])


def read(config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    try:
        found = detect_format(config).from_config(config)
        headers = {name: TensorHeader(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        scheme = found.scheme(P, headers)
        if scheme is not None:
            weight = found.read(P, tensors)
            assert weight.scheme == scheme
            weight.check(P)
            weight.dequantize()
    except InputError as error:
        assert str(error)


def nested(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and every object in it."""
    found = [config]
    for value in config.values():
        if isinstance(value, dict):
            found += nested(value)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_unchanged_checkpoint_is_read(name: str) -> None:
    found = detect_format(CONFIGS[name]).from_config(CONFIGS[name])
    found.read(P, TENSORS[name]).check(P)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_junk_in_the_config(name: str, data: st.DataObject) -> None:
    config = copy.deepcopy(CONFIGS[name])
    place = data.draw(st.sampled_from(nested(config)))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JUNK)
    read(config, TENSORS[name])


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_junk_among_the_tensors(name: str, data: st.DataObject) -> None:
    tensors = dict(TENSORS[name])
    changed = data.draw(st.sampled_from(sorted(tensors)))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 64]), max_size=3))
    values = torch.randint(-3, 100, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    tensors[changed] = values.to(data.draw(DTYPES))
    if data.draw(st.booleans()):
        del tensors[data.draw(st.sampled_from(sorted(tensors)))]
    read(CONFIGS[name], tensors)
