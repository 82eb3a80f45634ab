"""KV-cache scales under every name that checkpoints use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.formats.kv_scales import SPELLINGS, KVScales, kv_scales, scale_name, written_name

ATTENTION = "model.layers.3.self_attn"
DATA = Path(__file__).parent / "data"


def scales_of(tensors: dict[str, Tensor], num_kv_heads: int = 4) -> KVScales:
    return kv_scales(ATTENTION, tensors, tensors.__getitem__, num_kv_heads)


@pytest.mark.parametrize("spelling", [spelling for spelling in SPELLINGS if "{x}" in spelling])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1, 1)], ids=str)
def test_every_spelling_and_shape_is_read(spelling: str, shape: tuple[int, ...]) -> None:
    tensors = {f"{ATTENTION}.{spelling.format(x=which)}": torch.rand(shape).bfloat16() + 1 for which in "kv"}
    found = scales_of(tensors)
    for scale, stored in zip(found, tensors.values(), strict=True):
        assert scale is not None
        assert scale.dtype == torch.float32
        assert torch.equal(scale, stored.float().flatten())


def test_what_modelopt_exported_is_found() -> None:
    """The library says that the cache is FP8, and stores scales beside the projections: see data/make_modelopt.py."""
    assert json.loads((DATA / "modelopt.json").read_text())["NVFP4"]["config.json"]["quantization_config"][
        "kv_cache_scheme"
    ] == {"dynamic": False, "num_bits": 8, "type": "float"}
    exported = load_file(DATA / "modelopt.safetensors")
    tensors = {name.removeprefix("NVFP4/"): tensor for name, tensor in exported.items()}
    found = kv_scales("model.layers.0.self_attn", tensors, tensors.__getitem__, 1)
    assert found.key is not None
    assert torch.equal(found.key, tensors["model.layers.0.self_attn.k_proj.k_scale"].reshape(1))
    assert found.value is not None
    assert torch.equal(found.value, tensors["model.layers.0.self_attn.v_proj.v_scale"].reshape(1))


def test_one_deprecated_scale_stands_for_both() -> None:
    found = scales_of({f"{ATTENTION}.kv_scale": torch.tensor(0.5)})
    assert found.key is not None
    assert found.value is not None
    assert found.key.tolist() == found.value.tolist() == [0.5]


def test_a_scale_of_its_own_counts_before_one_for_both() -> None:
    found = scales_of({f"{ATTENTION}.kv_scale": torch.tensor(0.5), f"{ATTENTION}.v_scale": torch.tensor(2.0)})
    assert [scale.tolist() for scale in found if scale is not None] == [[0.5], [2.0]]


def test_absent_scales_are_none_and_other_layers_not_taken() -> None:
    tensors = {"model.layers.30.self_attn.k_scale": torch.ones(1), f"{ATTENTION}.q_scale": torch.ones(1)}
    assert scales_of(tensors) == KVScales(None, None)
    assert scale_name(ATTENTION, tensors, "k") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t * 0, "must be positive and finite"),
        (lambda t: -t, "must be positive and finite"),
        (lambda t: t / 0, "must be positive and finite"),
        (lambda t: t * torch.nan, "must be positive and finite"),
        (lambda t: t.repeat(3), r"k_scale is \[3\] of float32, but must be 1 or 4"),
        (lambda t: t[:0], r"k_scale is \[0\] of float32"),
        (lambda t: t.int(), r"k_scale is \[1\] of int32"),
    ],
)
def test_scales_that_are_none_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        scales_of({f"{ATTENTION}.k_scale": change(torch.ones(1))})
    assert f"{ATTENTION}.k_scale" in str(raised.value)


def test_each_format_has_the_name_that_its_readers_look_for() -> None:
    assert written_name(ATTENTION, "k", "modelopt") == f"{ATTENTION}.k_proj.k_scale"
    assert written_name(ATTENTION, "v", "compressed-tensors") == f"{ATTENTION}.v_scale"
    assert written_name(ATTENTION, "v", "fp8") == f"{ATTENTION}.v_scale"
