"""GPTQ: the sentences of its specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from aphroquant.errors import InputError, UsageError
from aphroquant.formats.base import TensorHeader
from aphroquant.formats.gptq import Gptq
from aphroquant.schemes import ActivationScheme, DenseScheme, IntegerScheme, QuantizedWeight, Scheme

Fixture = Callable[..., Any]
P = "model.layers.0.mlp.up_proj"
Q = "model.layers.1.mlp.up_proj"
SYM, ASYM = IntegerScheme(4, 32, symmetric=True), IntegerScheme(4, 32, symmetric=False)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def headers(k: int = 64, n: int = 16, groups: int = 2, **changes: TensorHeader | None) -> dict[str, TensorHeader]:
    found: dict[str, TensorHeader | None] = {
        "qweight": TensorHeader(torch.int32, (k // 8, n)),
        "qzeros": TensorHeader(torch.int32, (groups, n // 8)),
        "scales": TensorHeader(torch.float16, (groups, n)),
        "g_idx": TensorHeader(torch.int32, (k,)),
        **changes,
    }
    return {name: header for name, header in found.items() if header is not None}


def written(scheme: Scheme, weight: QuantizedWeight, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    target = Gptq.for_schemes({P: scheme}, [], **options)
    return target.quantization_config(), target.write(P, weight)


def test_the_config_is_what_the_field_writes() -> None:
    config = Gptq.for_schemes({P: SYM}, ["lm_head"]).quantization_config()
    expected = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "static_groups": False,
        "pack_dtype": "int32",
        "checkpoint_format": "gptq",
    }
    assert {key: config[key] for key in expected} == expected
    assert "dynamic" not in config
    assert config["meta"]["quantizer"][0].startswith("aphroquant:")


def test_shapes_and_dtypes_are_those_of_the_layout(integer_weight: Fixture) -> None:
    scheme = IntegerScheme(3, 32, symmetric=False)
    _, tensors = written(scheme, integer_weight(scheme, 64, 96))
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert found == {
        "qweight": (torch.int32, (9, 64)),
        "qzeros": (torch.int32, (3, 6)),
        "scales": (torch.float16, (3, 64)),
        "g_idx": (torch.int32, (96,)),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_version_1_for_symmetric_and_version_2_for_asymmetric_unless_forced() -> None:
    assert Gptq.for_schemes({P: SYM}, []).checkpoint_format == "gptq"
    assert Gptq.for_schemes({P: SYM, Q: ASYM}, []).checkpoint_format == "gptq_v2"
    assert Gptq.for_schemes({P: ASYM}, [], checkpoint_format="gptq").checkpoint_format == "gptq"
    assert Gptq.for_schemes({P: SYM}, [], checkpoint_format="gptq_v2").checkpoint_format == "gptq_v2"


@pytest.mark.parametrize(
    ("bits", "version", "words"),
    [
        (2, "gptq", [0x55555555]),
        (3, "gptq", [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (4, "gptq", [0x77777777]),
        (8, "gptq", [0x7F7F7F7F]),
        (2, "gptq_v2", [0xAAAAAAAA]),
        (3, "gptq_v2", [0x24924924, 0x49249249, 0x92492492]),
        (4, "gptq_v2", [0x88888888]),
        (8, "gptq_v2", [0x80808080]),
    ],
)
def test_symmetric_zeros_are_the_known_words(
    bits: int, version: str, words: list[int], integer_weight: Fixture
) -> None:
    scheme = IntegerScheme(bits, 32, symmetric=True)
    _, tensors = written(scheme, integer_weight(scheme, 32, 32), checkpoint_format=version)
    assert (tensors["qzeros"].numpy().view(np.uint32)[0, : len(words)] == words).all()


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_version_of_symmetric_files_is_told_by_the_words_not_the_label(
    bits: int, version: str, label: str, integer_weight: Fixture
) -> None:
    scheme = IntegerScheme(bits, 32, symmetric=True)
    weight = integer_weight(scheme, 32, 64)
    config, tensors = written(scheme, weight, checkpoint_format=version)
    read = Gptq.from_config({**config, "checkpoint_format": label}).read(P, tensors)
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert read.scheme == scheme


def test_version_1_stores_one_less_per_field_and_wraps_zero(integer_weight: Fixture) -> None:
    zeros = torch.arange(16, dtype=torch.uint8)[:, None]
    weight = integer_weight(ASYM, 16, 32)
    weight = QuantizedWeight(ASYM, {**weight.tensors, "zeros": zeros}, (16, 32))
    _, tensors = written(ASYM, weight, checkpoint_format="gptq")
    assert tensors["qzeros"].numpy().view(np.uint32).tolist() == [[0x6543210F, 0xEDCBA987]]
    _, tensors = written(ASYM, weight, checkpoint_format="gptq_v2")
    assert tensors["qzeros"].numpy().view(np.uint32).tolist() == [[0x76543210, 0xFEDCBA98]]


def test_asymmetric_files_are_read_by_their_label(integer_weight: Fixture) -> None:
    weight = integer_weight(ASYM, 16, 64)
    config, tensors = written(ASYM, weight)
    as_v1 = Gptq.from_config({**config, "checkpoint_format": "gptq"}).read(P, tensors)
    assert torch.equal(as_v1["zeros"], (weight["zeros"] + 1) % 16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("programs", [["gptqmodel:7.6.0"], "GPTQModel:5.0", ["optimum:2.3.0", "gptqmodel:7.6.0"]])
def test_version_1_of_gptqmodel_borrows_from_the_next_field(
    bits: int, programs: object, integer_weight: Fixture
) -> None:
    """It subtracts a one in each field from whole words; of 3 bits, which cross words, it does so in fields."""
    scheme = IntegerScheme(bits, 32, symmetric=False)
    weight = integer_weight(scheme, 64, 32)
    weight.tensors["zeros"][:, ::2] = 0
    weight.tensors["zeros"][3] = 0
    config, tensors = written(scheme, weight, checkpoint_format="gptq" if bits == 3 else "gptq_v2")
    if bits != 3:
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        with np.errstate(over="ignore"):
            tensors["qzeros"] = torch.from_numpy((tensors["qzeros"].numpy().view(np.uint32) - ones).view(np.int32))
    config |= {"checkpoint_format": "gptq", "meta": {"quantizer": programs}}
    assert Gptq.from_config(config).read(P, tensors).same_values(weight)


def test_quantize_config_json_is_written_for_the_readers_of_version_1() -> None:
    written = Gptq.for_schemes({P: SYM}, ["lm_head"])
    assert written.side_files() == {"quantize_config.json": written.quantization_config()}
    assert Gptq.for_schemes({P: ASYM}, ["lm_head"]).side_files() == {}


def test_symmetric_files_with_varying_zeros_are_refused(integer_weight: Fixture) -> None:
    config, tensors = written(ASYM, integer_weight(ASYM, 16, 64))
    with pytest.raises(InputError, match=r"up_proj\.qzeros are not the constant of a symmetric 4-bit") as raised:
        Gptq.from_config({**config, "sym": True}).read(P, tensors)
    assert '"sym": false' in str(raised.value.hint)


def test_an_absent_g_idx_means_groups_in_order(integer_weight: Fixture) -> None:
    weight = integer_weight(ASYM, 16, 64)
    config, tensors = written(ASYM, weight)
    assert tensors.pop("g_idx").tolist() == [0] * 32 + [1] * 32
    for order in ({"desc_act": False}, {"desc_act": True, "static_groups": True}):
        read = Gptq.from_config({**config, **order}).read(P, tensors)
        assert read.scheme == ASYM
        assert torch.equal(read.dequantize(), weight.dequantize())
    with pytest.raises(InputError, match="has no g_idx, although quantization_config says that there is an activation"):
        Gptq.from_config({**config, "desc_act": True}).read(P, tensors)


def test_an_activation_order_is_kept(integer_weight: Fixture, unpacked: Fixture, reread: Fixture) -> None:
    scheme = IntegerScheme(4, 32, symmetric=False, act_order=True)
    weight = integer_weight(scheme, 16, 96)
    target = Gptq.for_schemes({P: scheme}, [])
    config, tensors = target.quantization_config(), target.write(P, weight)
    assert config["desc_act"] is True
    assert torch.equal(tensors["g_idx"], weight["group_index"])
    read = reread(target).read(P, tensors)
    assert read.scheme == scheme
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert np.array_equal(unpacked(config, tensors), weight.dequantize().numpy())


def test_static_groups_and_single_groups_have_no_order(integer_weight: Fixture) -> None:
    _, tensors = written(ASYM, integer_weight(ASYM, 16, 64))
    ordered = {**CONFIG, "desc_act": True, "checkpoint_format": "gptq_v2"}
    assert Gptq.from_config({**ordered, "static_groups": True}).read(P, tensors).scheme == ASYM
    assert Gptq.from_config({**ordered, "meta": {"static_groups": True}}).read(P, tensors).scheme == ASYM
    channel = IntegerScheme(4, None, symmetric=False)
    config, tensors = written(channel, integer_weight(channel, 16, 64))
    assert config["group_size"] == -1
    assert Gptq.from_config({**config, "desc_act": True}).read(P, tensors).scheme == channel


def test_the_last_group_of_a_file_may_be_partial(unpacked: Fixture) -> None:
    found = headers(k=48, groups=2)
    assert Gptq.from_config(CONFIG).scheme(P, found) == ASYM
    tensors = {name: torch.ones(header.shape, dtype=header.dtype) for name, header in found.items()}
    tensors["g_idx"] = torch.arange(48, dtype=torch.int32) // 32
    read = Gptq.from_config({**CONFIG, "checkpoint_format": "gptq_v2"}).read(P, tensors)
    assert np.array_equal(unpacked({**CONFIG, "checkpoint_format": "gptq_v2"}, tensors), read.dequantize().numpy())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.full((64,), 2), r"g_idx\[0\] = 2 is not among the 2 groups"),
        (torch.full((64,), -1), r"g_idx\[0\] = -1 is not among"),
        (torch.arange(64) % 2, r"g_idx\[1\] = 1 is an activation order, although .* there is none"),
    ],
)
def test_a_bad_g_idx_is_named(index: torch.Tensor, message: str, integer_weight: Fixture) -> None:
    config, tensors = written(ASYM, integer_weight(ASYM, 16, 64))
    with pytest.raises(InputError, match=message):
        Gptq.from_config(config).read(P, {**tensors, "g_idx": index.to(torch.int32)})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (headers(qzeros=None), "up_proj: the tensor qzeros is missing"),
        (headers(scales=TensorHeader(torch.float16, (2, 8))), r"scales has shape \[2, 8\].* need \[2, 16\]"),
        (headers(groups=1), r"scales has shape \[1, 16\].* need \[2, 16\]"),
        (headers(qzeros=TensorHeader(torch.int32, (2, 4))), r"qzeros has shape \[2, 4\]"),
        (headers(g_idx=TensorHeader(torch.int32, (32,))), r"g_idx has shape \[32\].* need \[64\]"),
        (headers(qweight=TensorHeader(torch.float16, (8, 16))), "qweight has dtype float16, but must be int32"),
        (headers(qweight=TensorHeader(torch.int32, (0, 16))), r"qweight has shape \[0, 16\], but must be a matrix"),
    ],
)
def test_malformed_tensors_are_named(found: dict[str, TensorHeader], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Gptq.from_config(CONFIG).scheme(P, found)


def test_a_width_that_contradicts_the_tensors_is_found() -> None:
    with pytest.raises(InputError, match="8 rows, which are no whole number of 3-bit codes"):
        Gptq.from_config({**CONFIG, "bits": 3}).scheme(P, headers())
    with pytest.raises(InputError, match=r"scales has shape \[2, 16\].* need \[1, 16\]"):
        Gptq.from_config({**CONFIG, "bits": 8}).scheme(P, headers())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "GPTQ with bits = 5 is not readable; 2, 3, 4, 8 are"),
        ({"bits": True}, "bits = True must be an integer"),
        ({"group_size": -2}, "group_size = -2 must be positive, or -1"),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format 'gptq_p' is not readable"),
        ({"is_marlin_format": True}, "checkpoint_format 'marlin' is not readable"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16' is not readable"),
        ({"dynamic": []}, r"dynamic = \[\] must be an object"),
        ({"dynamic": {"+:x": {"bits": 7}}}, "bits = 7 is not readable"),
    ],
)
def test_malformed_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Gptq.from_config({**CONFIG, **changes})


def test_dynamic_overrides_one_module_and_the_first_match_wins() -> None:
    found = Gptq.from_config(
        {
            **CONFIG,
            "dynamic": {
                r"+:.*\.0\.mlp\.up_proj": {"bits": 8, "group_size": -1},
                r".*up_proj": {"sym": True},
                r"-:.*down_proj": {},
            },
        }
    )
    eight = headers(qweight=TensorHeader(torch.int32, (16, 16)), qzeros=TensorHeader(torch.int32, (1, 4)))
    eight["scales"] = TensorHeader(torch.float16, (1, 16))
    assert found.scheme(P, eight) == IntegerScheme(8, None, symmetric=False)
    assert found.scheme(Q, headers()) == SYM
    assert found.scheme("model.layers.0.mlp.gate_proj", headers()) == ASYM
    with pytest.raises(InputError, match=r"down_proj has a qweight, although .* leaves it dense"):
        found.scheme("model.layers.0.mlp.down_proj", headers())


def test_a_pattern_that_is_no_regular_expression_is_named() -> None:
    with pytest.raises(InputError, match=r"'\(' is not a regular expression"):
        Gptq.from_config({**CONFIG, "dynamic": {"-:(": {}}}).scheme(P, headers())


def test_mixed_schemes_are_written_as_dynamic_overrides(integer_weight: Fixture, reread: Fixture) -> None:
    schemes: dict[str, Scheme] = {
        P: SYM,
        Q: SYM,
        "model.layers.0.mlp.down_proj": IntegerScheme(8, None, symmetric=False),
        "model.layers.1.mlp.down_proj": IntegerScheme(2, 32, symmetric=True, act_order=True),
        "model.layers.2.mlp.gate": DenseScheme(torch.float16),
        "lm_head": SYM,
    }
    target = Gptq.for_schemes(schemes, ["model.layers.2.mlp.down_proj", "model.embed_tokens"])
    config = target.quantization_config()
    assert config["lm_head"] is True
    assert config["checkpoint_format"] == "gptq_v2"
    assert config["dynamic"] == {
        r"-:^model\.layers\.2\.mlp\.(?:down_proj|gate)$": {},
        r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "desc_act": False, "sym": False},
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 2, "group_size": 32, "desc_act": True, "sym": True},
    }
    for module, scheme in schemes.items():
        if isinstance(scheme, IntegerScheme):
            weight = integer_weight(scheme, 32, 64)
            read = reread(target).read(module, target.write(module, weight))
            assert read.scheme == scheme
            assert torch.equal(read.dequantize(), weight.dequantize())


def test_modules_without_qweight_are_dense() -> None:
    assert Gptq.from_config(CONFIG).scheme(P, {"weight": TensorHeader(torch.float16, (16, 64))}) is None


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (IntegerScheme(5, 32, symmetric=True), "gptq holds 2, 3, 4, 8 bits, not 5"),
        (IntegerScheme(4, 32, symmetric=False, has_offsets=True), "not real-valued offsets"),
        (IntegerScheme(8, None, symmetric=True, activations=ActivationScheme("int")), "no quantized inputs"),
    ],
)
def test_schemes_it_cannot_hold_are_refused_with_the_reason(scheme: IntegerScheme, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Gptq.for_schemes({P: scheme}, [])


@pytest.mark.parametrize(
    ("bits", "n", "k", "message"),
    [
        (4, 12, 64, "out_features = 12 to be a multiple of 8"),
        (4, 16, 48, "in_features = 48 to be a multiple of 32"),
        (3, 40, 64, "out_features = 40 to be a multiple of 32"),
        (2, 8, 64, "out_features = 8 to be a multiple of 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_when_writing(
    bits: int, n: int, k: int, message: str, integer_weight: Fixture
) -> None:
    scheme = IntegerScheme(bits, 32, symmetric=True)
    with pytest.raises(UsageError, match=message):
        written(scheme, integer_weight(scheme, n, k))


def test_scales_that_float16_cannot_hold_are_refused(integer_weight: Fixture) -> None:
    weight = integer_weight(SYM, 8, 64, dtype=torch.float32)
    with pytest.raises(
        UsageError, match=rf"{P}: scales\[0, 0\] = .* is between two numbers of float16.*, and gptq stores float16"
    ):
        written(SYM, weight)
