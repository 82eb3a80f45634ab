"""Junk in configs and tensors of the table and codebook formats ends in a weight or in an InputError, nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.formats import detect_format, format_class
from aphroquant.formats.base import TensorHeader
from aphroquant.schemes import (
    ActivationScheme,
    AdditiveScheme,
    AffineScheme,
    FloatScheme,
    IntegerScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)

P = "model.layers.0.mlp.experts.0.down_proj"  # an expert, which all of them hold
FP4_INPUTS = ActivationScheme("float", 4, granularity="group", group_size=16)
CASES: dict[str, tuple[str, Scheme]] = {
    "bitsandbytes nf4": ("bitsandbytes", LookupScheme("nf4", 64, "float", flattened=True)),
    "bitsandbytes double": ("bitsandbytes", LookupScheme("fp4", 64, "nested", flattened=True)),
    "bitsandbytes int8": ("bitsandbytes", IntegerScheme(8, None, symmetric=True)),
    "aqlm": ("aqlm", AdditiveScheme(2, 9, in_group=4)),
    "hqq": ("hqq", AffineScheme(3, 16)),
    "hqq axis 0": ("hqq", AffineScheme(2, None, axis=0)),
    "modelopt nvfp4": ("modelopt", LookupScheme("e2m1", 16, "e4m3", activations=FP4_INPUTS)),
    "modelopt fp8": ("modelopt", FloatScheme("channel", activations=ActivationScheme("float"))),
    "mxfp4": ("mxfp4", LookupScheme("e2m1", 32, "e8m0")),
    "compressed-tensors nvfp4": ("compressed-tensors", LookupScheme("e2m1", 16, "e4m3", activations=FP4_INPUTS)),
    "compressed-tensors mxfp4": ("compressed-tensors", LookupScheme("e2m1", 32, "e8m0")),
    "auto-round": ("auto-round", IntegerScheme(4, 32, symmetric=False)),
}
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, -1, 2**62, 10**400]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["NVFP4", "FP8", "local", "tensor_group", "auto_round", "nf4", "re:(", "(a", "float", "group"]),
    st.lists(st.integers(-2, 2**65), max_size=3),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float16, torch.float32]
DTYPES += [torch.float64, torch.float8_e4m3fn, torch.float8_e8m0fnu]


def weight_of(scheme: Scheme, n: int = 8, k: int = 64) -> QuantizedWeight:
    """A weight whose numbers are all ones, as far as the scheme lets them."""
    dtypes = {"codes": torch.uint8, "global_scale": torch.float64, "input_scale": torch.float64, **scheme.dtypes()}
    if isinstance(scheme, FloatScheme):
        dtypes["codes"] = torch.float8_e4m3fn
    tensors = {
        name: torch.ones(shape).to(dtypes.get(name, torch.float32)) for name, shape in scheme.shapes(n, k).items()
    }
    return QuantizedWeight(scheme, tensors, (n, k))


def stored(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    name, scheme = CASES[case]
    format = format_class(name).for_schemes({P: scheme}, [])
    return json.loads(json.dumps(format.quantization_config())), format.write(P, weight_of(scheme))


def read(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    try:
        found = detect_format(config).from_config(config)
        headers = {name: TensorHeader(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        scheme = found.scheme(P, headers)
        if scheme is not None:
            weight = found.read(P, tensors)
            assert weight.scheme == scheme
            weight.check(P)
            assert weight.dequantize().shape == weight.shape
    except InputError as error:
        assert str(error)


def nested(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and every object in it that is not empty."""
    found = [config] if config else []
    for value in config.values():
        if isinstance(value, dict):
            found += nested(value)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_unchanged_checkpoint_is_read(case: str) -> None:
    config, tensors = stored(case)
    weight = detect_format(config).from_config(config).read(P, tensors)
    weight.check(P)
    assert weight.scheme == CASES[case][1]
    assert torch.equal(weight.dequantize(), weight_of(CASES[case][1]).dequantize())


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_junk_in_the_config(case: str, data: st.DataObject) -> None:
    config, tensors = stored(case)
    config = copy.deepcopy(config)
    place = data.draw(st.sampled_from(nested(config)))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JUNK)
    read(config, tensors)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_junk_among_the_tensors(case: str, data: st.DataObject) -> None:
    config, tensors = stored(case)
    changed = data.draw(st.sampled_from(sorted(tensors)))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 64]), max_size=4))
    values = torch.randint(-3, 100, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    tensors[changed] = values.to(data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()):
        del tensors[data.draw(st.sampled_from(sorted(tensors)))]
    read(config, tensors)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_other_bytes_in_a_tensor(case: str, data: st.DataObject) -> None:
    config, tensors = stored(case)
    changed = data.draw(st.sampled_from(sorted(tensors)))
    raw = tensors[changed].contiguous().reshape(-1).view(torch.uint8).clone()
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, raw.numel() - 1))] = data.draw(st.integers(0, 255))
    tensors[changed] = raw.view(tensors[changed].dtype).view(tensors[changed].shape)
    read(config, tensors)
