"""HQQ files, judged by layers that the library stored and by a packer that sets one field at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.formats.hqq import Hqq, tag_of
from aphroquant.formats.hqq.packing import BITS, PACKINGS, Packing, pack, unpack
from aphroquant.formats.reading import headers_of
from aphroquant.schemes import AffineScheme, IntegerScheme, LookupScheme, QuantizedWeight, Scheme

MODULE = "model.layers.0.mlp.down_proj"
OTHER = "model.layers.1.mlp.down_proj"


def library_layers() -> dict[str, dict[str, Tensor]]:
    """The layers of data/hqq.safetensors: see data/make_hqq.py."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(Path(__file__).parent / "data" / "hqq.safetensors").items():
        name, _, suffix = key.partition(".")
        layers.setdefault(name, {})[suffix] = tensor
    return layers


LIBRARY_LAYERS = library_layers()


def config_of(**parameters: Any) -> dict[str, Any]:
    settings = {"nbits": 4, "group_size": 16, "axis": 1, "view_as_float": False} | parameters
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": settings}, "skip_modules": ["lm_head"]}


def affine_weight(scheme: AffineScheme, n: int = 8, k: int = 32) -> QuantizedWeight:
    groups = scheme.num_groups(n, k)
    tensors = {
        "codes": torch.randint(0, 2**scheme.bits, (n, k), dtype=torch.uint8),
        "scales": torch.rand(groups).half(),
        "zeros": torch.randn(groups).half(),
    }
    return QuantizedWeight(scheme, tensors, (n, k))


def stored_tensors(bits: int = 4, group_size: int | None = 16) -> dict[str, Tensor]:
    scheme = AffineScheme(bits, group_size)
    return Hqq.for_schemes({MODULE: scheme}, []).write(MODULE, affine_weight(scheme))


@pytest.mark.parametrize("name", LIBRARY_LAYERS)
def test_the_library_s_layers_are_read_bit_for_bit_and_written_byte_for_byte(name: str) -> None:
    tensors = dict(LIBRARY_LAYERS[name])
    expected = tensors.pop("weight")
    nbits, group, axis, *_ = name.replace("_", ".").split("-")
    group_size = None if group == "gNone" else int(group[1:])
    config = config_of(nbits=json.loads(nbits[1:]), group_size=group_size, axis=int(axis[1:]))
    format = Hqq.from_config(config)
    weight = format.read(MODULE, tensors)
    assert torch.equal(weight.dequantize(), expected)

    again = Hqq.for_schemes({MODULE: weight.scheme}, []).write(MODULE, weight)
    assert again.keys() == tensors.keys()
    as_float = bool(tensors["view_as_float"])
    for suffix in ("W_q", "scale", "zero", "shape", "group_size", "axis", "packing", "compute_dtype"):
        stored = tensors[suffix].view(again[suffix].dtype) if suffix == "W_q" and as_float else tensors[suffix]
        assert again[suffix].dtype == stored.dtype
        assert torch.equal(again[suffix], stored), suffix
    assert torch.equal(format.read(MODULE, again).dequantize(), expected)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=lambda packing: packing.name)
@pytest.mark.parametrize("columns", [1, 3])
def test_each_field_of_a_number_is_a_row_of_another_part(packing: Packing, columns: int) -> None:
    parts = 2
    rows = parts * packing.fields - (3 if packing.fields == 10 else 0)
    codes = torch.randint(0, 2**packing.bits, (rows, columns), dtype=torch.uint8)
    packed = pack(codes, packing)
    assert packed.shape == (parts, columns)
    for row, values in enumerate(codes.tolist()):
        field, part = divmod(row, parts)
        shift = packing.bits * (packing.fields - 1 - field)
        for column, code in enumerate(values):
            assert int(packed[part, column]) >> shift & 2**packing.bits - 1 == code
    assert torch.equal(unpack(packed, packing, rows), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group_size", [8, 64, None])
def test_what_is_written_is_read_again(
    bits: int, axis: Any, group_size: int | None, reread: Callable[[Format], Format]
) -> None:
    weight = affine_weight(AffineScheme(bits, group_size, axis), 32, 48)
    format = Hqq.for_schemes({MODULE: weight.scheme}, [])
    again = reread(format).read(MODULE, format.write(MODULE, weight))
    assert again.scheme == weight.scheme
    assert again.shape == weight.shape
    for name, tensor in weight.tensors.items():
        assert torch.equal(again[name], tensor)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, None])
def test_integer_zero_points_become_real_ones_without_a_change(
    symmetric: bool, group_size: int | None, integer_weight: Callable[..., QuantizedWeight]
) -> None:
    weight = integer_weight(IntegerScheme(4, group_size, symmetric), 8, 32)
    format = Hqq.for_schemes({MODULE: weight.scheme}, [])
    again = format.read(MODULE, format.write(MODULE, weight))
    assert again.scheme == AffineScheme(4, group_size)
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_schemes_by_tag_are_kept_apart(reread: Callable[[Format], Format]) -> None:
    schemes = {MODULE: AffineScheme(2, 16), "model.layers.0.self_attn.q_proj": AffineScheme(4, 64)}
    format = reread(Hqq.for_schemes(schemes, ["model.layers.0.mlp.gate"]))
    assert isinstance(format, Hqq)
    assert format.skip_modules == ("mlp.gate", "lm_head")
    assert format.scheme_of(OTHER) == AffineScheme(2, 16)
    assert format.scheme_of("model.layers.7.self_attn.q_proj") == AffineScheme(4, 64)
    assert format.scheme_of("model.layers.7.self_attn.k_proj") is None


def test_a_tag_is_the_name_without_numbers_model_and_layers() -> None:
    assert tag_of("model.layers.12.self_attn.q_proj") == "self_attn.q_proj"
    assert tag_of("lm_head") == "lm_head"


def test_tags_that_do_not_tell_modules_apart_are_refused() -> None:
    with pytest.raises(UsageError, match=r"one scheme for every mlp\.down_proj"):
        Hqq.for_schemes({MODULE: AffineScheme(4, 64), OTHER: AffineScheme(4, 32)}, [])
    with pytest.raises(UsageError, match=r"leave another mlp\.down_proj dense"):
        Hqq.for_schemes({MODULE: AffineScheme(4, 64)}, [OTHER])


def test_a_module_without_codes_is_dense() -> None:
    assert Hqq.from_config(config_of()).scheme("lm_head", {"weight": TensorHeader(torch.float16, (4, 4))}) is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"nbits": 7},
        {"nbits": None},
        {"nbits": 4.0},
        {"nbits": True},
        {"group_size": 0},
        {"group_size": "64"},
        {"axis": 2},
        {"axis": [1]},
    ],
    ids=str,
)
def test_an_absurd_config_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(parameters))):
        Hqq.from_config(config_of(**parameters))


@pytest.mark.parametrize("settings", [{"mlp.down_proj": 4}, {"mlp.down_proj": {}}, [], "4 bits"], ids=str)
def test_a_config_without_parameters_is_refused(settings: Any) -> None:
    with pytest.raises(InputError, match="quant_config"):
        Hqq.from_config({"quant_method": "hqq", "quant_config": settings})


def test_a_tag_of_null_stays_dense() -> None:
    config = config_of()["quant_config"]
    format = Hqq.from_config({"quant_config": {"mlp.up_proj": None, "mlp.down_proj": config}})
    with pytest.raises(InputError, match="leaves it dense"):
        format.scheme("model.layers.0.mlp.up_proj", headers_of(stored_tensors()))
    assert format.scheme(MODULE, headers_of(stored_tensors())) == AffineScheme(4, 16)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("W_q", lambda t: t[:-1], r"W_q has shape \[7, 16\]"),
        ("W_q", lambda t: t[:, :-1], r"W_q has shape \[8, 15\]"),
        ("W_q", lambda t: t.flatten(), "W_q has shape"),
        ("W_q", lambda t: t.int(), "W_q has dtype int32"),
        ("scale", lambda t: t.T, "not that of groups along 1"),
        ("scale", lambda t: t[:-1], "zero has shape"),
        ("scale", lambda t: t.byte(), "scale has dtype uint8"),
        ("zero", lambda t: t[:-1], "zero has shape"),
        ("shape", lambda t: t + 1, r"shape is \[9, 33\]"),
        ("shape", lambda t: t * 0, r"shape is \[0, 0\]"),
        ("shape", lambda t: -t, r"shape is \[-8, -32\]"),
        ("shape", lambda t: torch.full((2,), 2**62), "shape is"),
        ("shape", lambda t: t[:1], r"shape has shape \[1\]"),
        ("nbits", lambda t: t + 1, "nbits is 5"),
        ("nbits", lambda t: torch.ones(3), "nbits is nan"),
        ("axis", lambda t: t * 0, "axis is 0"),
        ("group_size", lambda t: t * 2, "group_size is 32"),
        ("quant_zero", lambda t: t + 1, "quant_zero is 1"),
        ("packing", lambda t: t + 1, "packing is '5cju`v9'"),
        ("packing", lambda t: torch.zeros(99, dtype=torch.uint8), "at most 64 letters"),
    ],
)
def test_malformed_tensors_are_told_by_name(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    tensors = stored_tensors()
    with pytest.raises(InputError, match=message) as raised:
        Hqq.from_config(config_of()).read(MODULE, {**tensors, name: change(tensors[name])})
    assert MODULE in str(raised.value)


@pytest.mark.parametrize("name", ["scale", "zero", "shape"])
def test_missing_tensors_are_told_by_name(name: str) -> None:
    tensors = stored_tensors()
    del tensors[name]
    with pytest.raises(InputError, match=f"the tensor {name} is missing"):
        Hqq.from_config(config_of()).scheme(MODULE, headers_of(tensors))


def test_codes_out_of_range_are_refused() -> None:
    tensors = stored_tensors(5)
    tensors["W_q"][0, 0] = 32
    with pytest.raises(InputError, match="W_q has the code 32, the limit is 31"):
        Hqq.from_config(config_of(nbits=5)).read(MODULE, tensors)


def test_groups_that_only_fit_because_of_filled_up_rows_are_refused() -> None:
    """Three bits: 11 and 12 rows are as many words."""
    tensors = stored_tensors(3, None)
    tensors |= {name: tensors[name][:7] for name in ("scale", "zero")}
    with pytest.raises(InputError, match="scales has shape"):
        Hqq.from_config(config_of(nbits=3, group_size=None)).read(MODULE, tensors)


@pytest.mark.parametrize(
    "scheme",
    [
        AffineScheme(7, 64),
        IntegerScheme(4, 64, symmetric=False, has_offsets=True),
        IntegerScheme(4, 64, symmetric=True, act_order=True),
        LookupScheme("nf4", 64, "float", flattened=True),
    ],
    ids=str,
)
def test_schemes_that_it_cannot_hold_are_refused(scheme: Scheme) -> None:
    with pytest.raises(UsageError, match=r"down_proj: hqq holds .* not"):
        Hqq.for_schemes({MODULE: scheme}, [])


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (AffineScheme(4, 8), (1, 24), "rows of codes = 3"),
        (AffineScheme(1, None), (12, 8), "rows of codes = 12"),
        (AffineScheme(4, 16), (3, 8), r"\[3, 8\] is no whole number of groups"),
        (IntegerScheme(4, 16, symmetric=True), (8, 24), "in_features = 24"),
    ],
)
def test_shapes_that_it_cannot_hold_are_refused(
    scheme: Any, shape: tuple[int, int], message: str, integer_weight: Callable[..., QuantizedWeight]
) -> None:
    make = affine_weight if isinstance(scheme, AffineScheme) else integer_weight
    with pytest.raises((UsageError, InputError), match=message):
        Hqq.for_schemes({MODULE: scheme}, []).write(MODULE, make(scheme, *shape))
