"""AutoRound checkpoints, judged by what the library itself exported: see data/make_auto_round.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import detect_format
from aphroquant.formats.autoround import PACKINGS, AutoRound
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.formats.reading import headers_of
from aphroquant.schemes import FloatScheme, IntegerScheme, QuantizedWeight, Scheme

DATA = Path(__file__).parent / "data"
CONFIGS: dict[str, dict[str, Any]] = json.loads((DATA / "auto_round.json").read_text())
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
# Relative errors of rounding normal weights to 2, 3, 4 and 8 bits. Zero points off by one give more than 0.2 at 4 bits.
LARGEST_ERROR = {2: 0.45, 3: 0.2, 4: 0.1, 8: 0.01}


@pytest.fixture(scope="module")
def exported() -> dict[str, Tensor]:
    return load_file(DATA / "auto_round.safetensors")


def tensors_of(exported: dict[str, Tensor], export: str, module: str) -> dict[str, Tensor]:
    prefix = f"{export}/{module}."
    return {name.removeprefix(prefix): tensor for name, tensor in exported.items() if name.startswith(prefix)}


@pytest.mark.parametrize("module", [Q, DOWN])
@pytest.mark.parametrize("export", CONFIGS)
def test_an_export_is_near_the_weights_it_was_made_from_and_written_again_byte_for_byte(
    export: str, module: str, exported: dict[str, Tensor]
) -> None:
    format = AutoRound.from_config(CONFIGS[export])
    tensors = tensors_of(exported, export, module)
    weight = format.read(module, tensors)
    weight.check(module)
    dense = exported[f"dense/{module}.weight"].float()
    error = float((weight.dequantize() - dense).norm() / dense.norm())
    assert isinstance(weight.scheme, IntegerScheme)
    assert weight.scheme.bits == (8 if module == DOWN and export != "awq4" else CONFIGS[export]["bits"])
    assert weight.scheme.group_size == (64 if module == DOWN else 32)
    assert error < LARGEST_ERROR[weight.scheme.bits]
    again = format.write(module, weight)
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor), name
    assert again.keys() - tensors.keys() <= {"g_idx"}


def test_the_zero_points_of_both_gptq_versions_mean_the_same_weights(exported: dict[str, Tensor]) -> None:
    v1, v2 = (
        AutoRound.from_config(CONFIGS[export]).read(Q, tensors_of(exported, export, Q)) for export in ("gptq4", "asym4")
    )
    assert not torch.equal(exported[f"gptq4/{Q}.qzeros"], exported[f"asym4/{Q}.qzeros"])
    assert torch.equal(v1.dequantize(), v2.dequantize())


@pytest.mark.parametrize(
    ("schemes", "packing"),
    [
        ({Q: IntegerScheme(4, 32, True), DOWN: IntegerScheme(8, None, True)}, "auto_round:auto_gptq"),
        ({Q: IntegerScheme(4, 32, False), DOWN: IntegerScheme(4, 64, True)}, "auto_round:auto_awq"),
        ({Q: IntegerScheme(3, 32, False), DOWN: IntegerScheme(2, 64, False)}, "auto_round:gptqmodel"),
    ],
    ids=["symmetric", "asymmetric 4 bits", "asymmetric"],
)
def test_what_is_written_is_read_again(
    schemes: dict[str, Scheme],
    packing: str,
    integer_weight: Callable[..., QuantizedWeight],
    reread: Callable[[Format], Format],
    unpacked: Callable[..., np.ndarray],
) -> None:
    written = AutoRound.for_schemes(schemes, ["model.layers.0.mlp.gate"])
    config = written.quantization_config()
    assert config["packing_format"] == packing
    assert config["extra_config"]["model.layers.0.mlp.gate"] == {"bits": 16}
    for module, scheme in schemes.items():
        weight = integer_weight(scheme, 32, 64)
        tensors = written.write(module, weight)
        again = reread(written).read(module, tensors)
        assert again.scheme == scheme
        assert torch.equal(again.dequantize(), weight.dequantize())
        assert isinstance(scheme, IntegerScheme)
        judged = {
            "quant_method": "awq" if packing.endswith("awq") else "gptq",
            "checkpoint_format": "gptq" if packing.endswith("gptq") else "gptq_v2",
            "bits": scheme.bits,
            "group_size": scheme.group_size or 64,
        }
        groups = torch.arange(64) // judged["group_size"]
        assert np.array_equal(unpacked(judged, {"g_idx": groups, **tensors}), weight.dequantize().numpy())


def test_a_quantized_head_is_named_for_readers_that_look_only_into_blocks() -> None:
    scheme = IntegerScheme(4, 32, True)
    config = AutoRound.for_schemes({Q: scheme, "lm_head": scheme}, []).quantization_config()
    assert config["extra_config"] == {"lm_head": {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}}


def test_settings_are_told_by_name_then_by_pattern(exported: dict[str, Tensor]) -> None:
    extra = {
        "model.layers.1.mlp.down_proj": {"bits": 8, "group_size": 64, "sym": True},
        r".*mlp\..*": {"bits": 2},
        "self_attn.k_proj$": {"group_size": -1},
        "model.layers.0": {"bits": 3},
        "lm_head": {"bits": 16, "data_type": "float"},
    }
    format = AutoRound.from_config(CONFIGS["asym4"] | {"extra_config": extra})
    assert format.settings_of(DOWN) == (8, 64, True)
    assert format.settings_of("model.layers.0.mlp.up_proj") == (2, 32, False)
    assert format.settings_of("model.layers.0.self_attn.k_proj") == (4, None, False)
    assert format.settings_of("model.layers.0.self_attn.q_proj") == (4, 32, False)
    assert format.settings_of("lm_head") is None
    with pytest.raises(InputError, match=r"lm_head has a qweight, although .* leaves it dense"):
        format.scheme("lm_head", headers_of(tensors_of(exported, "asym4", Q)))
    assert format.scheme("lm_head", {"weight": TensorHeader(torch.float16, (8, 8))}) is None


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_spelling_of_a_packing_is_known(packing: str, exported: dict[str, Tensor]) -> None:
    export = "awq4" if packing.endswith("awq") else "sym4"
    format = AutoRound.from_config(CONFIGS[export] | {"packing_format": packing})
    expected = AutoRound.from_config(CONFIGS[export])
    tensors = tensors_of(exported, export, Q)
    assert torch.equal(format.read(Q, tensors).dequantize(), expected.read(Q, tensors).dequantize())


def test_older_files_have_another_name_for_the_method() -> None:
    assert detect_format({"quant_method": "intel/auto-round"}) is AutoRound


@pytest.mark.parametrize(
    "changes",
    [
        {"packing_format": "auto_round:llm_compressor"},
        {"packing_format": "auto_round:fp8"},
        {"packing_format": 4},
        {"bits": None},
        {"bits": 16},
        {"bits": 5},
        {"sym": "yes"},
        {"group_size": 0},
        {"data_type": "mx_fp"},
        {"act_bits": 8},
        {"extra_config": [Q]},
        {"extra_config": {Q: 4}},
        {"extra_config": {Q: {"bits": 7}}},
        {"packing_format": "auto_round:auto_awq", "extra_config": {Q: {"bits": 8}}},
    ],
    ids=str,
)
def test_configs_that_are_not_readable_are_told(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="quantization_config"):
        AutoRound.from_config(CONFIGS["sym4"] | {"extra_config": {}} | changes)


def test_a_pattern_that_is_none_is_told() -> None:
    format = AutoRound.from_config(CONFIGS["sym4"] | {"extra_config": {"*mlp": {"bits": 8}}})
    with pytest.raises(InputError, match="is not a regular expression"):
        format.settings_of(Q)


@pytest.mark.parametrize("name", ["qzeros", "scales"])
def test_missing_tensors_are_told_by_name(name: str, exported: dict[str, Tensor]) -> None:
    tensors = tensors_of(exported, "asym4", Q)
    del tensors[name]
    with pytest.raises(InputError, match=f"the tensor {name} is missing"):
        AutoRound.from_config(CONFIGS["asym4"]).scheme(Q, headers_of(tensors))


@pytest.mark.parametrize(
    "scheme",
    [
        FloatScheme("tensor"),
        IntegerScheme(5, 32, True),
        IntegerScheme(4, 32, True, act_order=True),
        IntegerScheme(4, 32, False, has_offsets=True),
    ],
    ids=str,
)
def test_schemes_that_it_cannot_hold_are_refused(scheme: Scheme) -> None:
    with pytest.raises(UsageError, match="q_proj: auto-round"):
        AutoRound.for_schemes({Q: scheme}, [])
