"""compressed-tensors: the sentences of its specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aphroquant.errors import InputError, UsageError
from aphroquant.formats.base import TensorHeader
from aphroquant.formats.compressed_tensors import CompressedTensors
from aphroquant.formats.packing import pack
from aphroquant.schemes import (
    ActivationScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    QuantizedWeight,
    Scheme,
)

Fixture = Callable[..., Any]
P = "model.layers.0.mlp.up_proj"
Q = "model.layers.1.mlp.up_proj"
W4, W4_ASYM = IntegerScheme(4, 32, symmetric=True), IntegerScheme(4, 32, symmetric=False)
W8A8 = IntegerScheme(8, None, symmetric=True, activations=ActivationScheme("int"))
FP8_STATIC = FloatScheme("tensor", activations=ActivationScheme("float", dynamic=False, granularity="tensor"))
FP8_DYNAMIC = FloatScheme("channel", activations=ActivationScheme("float"))
FP8_BLOCK = FloatScheme("block", (128, 128), ActivationScheme("float", granularity="group", group_size=128))


def arguments(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    return {key: value for key, value in {**weights, **changes}.items() if value is not ...}


def config(group: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments(), **(group or {})}},
        **changes,
    }


def headers(**changes: TensorHeader | None) -> dict[str, TensorHeader]:
    found: dict[str, TensorHeader | None] = {
        "weight_packed": TensorHeader(torch.int32, (16, 8)),
        "weight_scale": TensorHeader(torch.bfloat16, (16, 2)),
        "weight_shape": TensorHeader(torch.int64, (2,)),
        **changes,
    }
    return {name: header for name, header in found.items() if header is not None}


def float_weight(scheme: FloatScheme, n: int, k: int) -> QuantizedWeight:
    shape: tuple[int, ...] = () if scheme.granularity == "tensor" else (n, 1)
    if scheme.block_shape:
        shape = (-(-n // scheme.block_shape[0]), -(-k // scheme.block_shape[1]))
    tensors = {"codes": torch.randn(n, k).mul(100).to(torch.float8_e4m3fn), "scales": torch.rand(shape).bfloat16()}
    if scheme.activations and not scheme.activations.dynamic:
        tensors["input_scale"] = torch.tensor(0.25)
    return QuantizedWeight(scheme, tensors, (n, k))


def weight_of(scheme: Scheme, integer_weight: Fixture) -> QuantizedWeight:
    if isinstance(scheme, FloatScheme):
        return float_weight(scheme, 96, 160)
    weight: QuantizedWeight = integer_weight(scheme, 96, 160)
    static = weight.scheme.activations and not weight.scheme.activations.dynamic  # type: ignore[union-attr]
    extra = {"input_scale": torch.tensor(0.25)} if static else {}
    return QuantizedWeight(scheme, {**weight.tensors, **extra}, weight.shape)


SCHEMES: list[Scheme] = [
    W4,
    W4_ASYM,
    W8A8,
    FP8_STATIC,
    FP8_DYNAMIC,
    FP8_BLOCK,
    IntegerScheme(8, None, symmetric=False),
    IntegerScheme(3, 32, symmetric=False),
    IntegerScheme(8, None, symmetric=False, activations=ActivationScheme("int")),
    IntegerScheme(8, None, symmetric=True, activations=ActivationScheme("int", dynamic=False, granularity="tensor")),
    IntegerScheme(4, 32, symmetric=True, activations=ActivationScheme("float")),
    FloatScheme("tensor"),
    FloatScheme("block", (1, 32)),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_written_reads_back_bit_equal(scheme: Scheme, integer_weight: Fixture, reread: Fixture) -> None:
    weight = weight_of(scheme, integer_weight)
    target = CompressedTensors.for_schemes({P: scheme}, [])
    read = reread(target).read(P, target.write(P, weight))
    assert read.scheme == scheme
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert {name: tensor.dtype for name, tensor in read.tensors.items()} == {
        name: tensor.dtype for name, tensor in weight.tensors.items()
    }


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(5, 7), (33, 31), (1, 65)])
def test_every_width_and_odd_sizes_survive(
    bits: int, shape: tuple[int, int], integer_weight: Fixture, reread: Fixture, unpacked: Fixture
) -> None:
    scheme = IntegerScheme(bits, None, symmetric=False)
    weight = integer_weight(scheme, *shape)
    target = CompressedTensors.for_schemes({P: scheme}, [])
    tensors = target.write(P, weight)
    assert torch.equal(reread(target).read(P, tensors).dequantize(), weight.dequantize())
    assert (unpacked(target.quantization_config(), tensors) == weight.dequantize().numpy()).all()


def test_the_config_is_what_the_field_writes() -> None:
    assert CompressedTensors.for_schemes({P: W4_ASYM}, ["lm_head"]).quantization_config() == {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


@pytest.mark.parametrize(
    ("scheme", "stored", "weights", "inputs"),
    [
        (
            W8A8,
            "int-quantized",
            {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        ),
        (
            FP8_STATIC,
            "float-quantized",
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
        ),
        (
            FP8_DYNAMIC,
            "float-quantized",
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
        ),
    ],
    ids=["W8A8", "FP8", "FP8_DYNAMIC"],
)
def test_arguments_of_weights_and_inputs(
    scheme: Scheme, stored: str, weights: dict[str, Any], inputs: dict[str, Any]
) -> None:
    written = CompressedTensors.for_schemes({P: scheme}, []).quantization_config()
    group = written["config_groups"]["group_0"]
    assert (written["format"], group["weights"], group["input_activations"]) == (stored, weights, inputs)


def test_blocks_stand_in_the_arguments() -> None:
    group = CompressedTensors.for_schemes({P: FP8_BLOCK}, []).quantization_config()["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["weights"]["block_structure"]) == ("block", [128, 128])
    assert (group["input_activations"]["strategy"], group["input_activations"]["group_size"]) == ("group", 128)


def test_shapes_and_dtypes_are_those_of_the_layout(integer_weight: Fixture) -> None:
    def written(scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        tensors = CompressedTensors.for_schemes({P: scheme}, []).write(P, weight_of(scheme, integer_weight))
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    assert written(W4_ASYM) == {
        "weight_packed": (torch.int32, (96, 20)),
        "weight_scale": (torch.float16, (96, 5)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (12, 5)),
    }
    assert written(W8A8) == {"weight": (torch.int8, (96, 160)), "weight_scale": (torch.float16, (96, 1))}
    assert written(FP8_STATIC) == {
        "weight": (torch.float8_e4m3fn, (96, 160)),
        "weight_scale": (torch.bfloat16, (1,)),
        "input_scale": (torch.float32, (1,)),
    }
    assert written(FP8_BLOCK)["weight_scale"] == (torch.bfloat16, (1, 2))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("shape", [(8, 32), (11, 64), (33, 96), (11, 11)])
def test_the_padded_packing_before_0_18_is_read(bits: int, shape: tuple[int, int], integer_weight: Fixture) -> None:
    """With (11, 11) both layouts have as many words, and only the version tells them apart."""
    group_size = 32 if shape[1] % 32 == 0 else None
    weight = integer_weight(IntegerScheme(bits, group_size, symmetric=False), *shape)
    dense = CompressedTensors.for_schemes({P: weight.scheme}, [])
    tensors = dense.write(P, weight)
    padded = {
        **tensors,
        "weight_packed": pack(weight["codes"], bits, padded=True),
        "weight_zero_point": pack(weight["zeros"], bits, dim=0, padded=True),
    }
    old = CompressedTensors.from_config({**dense.quantization_config(), "version": "0.17.1"})
    new = CompressedTensors.from_config({**dense.quantization_config(), "version": "0.18.0"})
    assert torch.equal(old.read(P, padded)["codes"], weight["codes"])
    assert torch.equal(old.read(P, padded)["zeros"], weight["zeros"])
    assert torch.equal(new.read(P, tensors)["codes"], weight["codes"])
    assert torch.equal(new.read(P, tensors)["zeros"], weight["zeros"])


def test_unpacked_zero_points_of_the_oldest_files_are_read(integer_weight: Fixture) -> None:
    weight = integer_weight(W4_ASYM, 16, 64)
    target = CompressedTensors.for_schemes({P: W4_ASYM}, [])
    unpacked_zeros = (weight["zeros"].to(torch.int16) - 8).to(torch.int8)
    read = target.read(P, {**target.write(P, weight), "weight_zero_point": unpacked_zeros})
    assert torch.equal(read["zeros"], weight["zeros"])


def test_an_activation_order_of_older_files_is_read(integer_weight: Fixture) -> None:
    weight = integer_weight(W4, 16, 64)
    order = torch.randperm(64).div(32, rounding_mode="floor").to(torch.int32)
    target = CompressedTensors.for_schemes({P: W4}, [])
    read = target.read(P, {**target.write(P, weight), "weight_g_idx": order})
    assert read.scheme == IntegerScheme(4, 32, symmetric=True, act_order=True)
    assert torch.equal(read.dequantize(), (weight["codes"].float() - 8) * weight["scales"].float()[:, order.long()])
    with pytest.raises(InputError, match="weight_g_idx must be 64 group numbers below 2"):
        target.read(P, {**target.write(P, weight), "weight_g_idx": order + 1})


def test_one_scale_for_a_tensor_becomes_one_a_row() -> None:
    found = CompressedTensors.from_config(
        config({"weights": arguments(num_bits=8, strategy="tensor", group_size=None)}, format="int-quantized")
    )
    tensors = {"weight": torch.randint(-128, 128, (4, 6), dtype=torch.int8), "weight_scale": torch.tensor([0.5])}
    assert torch.equal(found.read(P, tensors).dequantize(), tensors["weight"].float() * 0.5)


def test_a_strategy_may_be_told_by_the_group_size() -> None:
    for group_size, expected in ((32, 32), (-1, None)):
        found = CompressedTensors.from_config(config({"weights": arguments(strategy=..., group_size=group_size)}))
        scale = TensorHeader(torch.float16, (16, 2 if expected else 1))
        assert found.scheme(P, headers(weight_scale=scale)) == IntegerScheme(4, expected, symmetric=True)


def test_output_activations_of_older_files_say_nothing_about_the_layer() -> None:
    found = CompressedTensors.from_config(config({"output_activations": arguments(strategy="tensor", group_size=...)}))
    assert found.scheme(P, headers(output_scale=TensorHeader(torch.float16, (1,)))) == W4


def test_several_schemes_are_written_as_groups_with_their_own_formats(integer_weight: Fixture, reread: Fixture) -> None:
    schemes: dict[str, Scheme] = {
        P: W4,
        Q: W8A8,
        "model.layers.2.mlp.up_proj": W4,
        "a.gate": DenseScheme(torch.float16),
    }
    target = CompressedTensors.for_schemes(schemes, ["lm_head"])
    written = target.quantization_config()
    assert written["format"] == "mixed-precision"
    assert [group["format"] for group in written["config_groups"].values()] == ["pack-quantized", "int-quantized"]
    assert [group["targets"] for group in written["config_groups"].values()] == [[P, "model.layers.2.mlp.up_proj"], [Q]]
    assert written["ignore"] == ["lm_head", "a.gate"]
    for module, scheme in schemes.items():
        if isinstance(scheme, IntegerScheme):
            weight = weight_of(scheme, integer_weight)
            assert torch.equal(
                reread(target).read(module, target.write(module, weight)).dequantize(), weight.dequantize()
            )


def test_groups_of_one_format_do_not_repeat_it() -> None:
    schemes: dict[str, Scheme] = {P: W4, Q: IntegerScheme(8, None, symmetric=True)}
    written = CompressedTensors.for_schemes(schemes, []).quantization_config()
    assert written["format"] == "pack-quantized"
    assert all("format" not in group for group in written["config_groups"].values())


def test_names_come_before_patterns_and_patterns_before_classes() -> None:
    groups = {
        "by_class": {"targets": ["Linear"], "weights": arguments(num_bits=2)},
        "by_pattern": {"targets": ["re:.*mlp.*"], "weights": arguments(num_bits=3)},
        "by_name": {"targets": [P], "weights": arguments(num_bits=4)},
    }
    found = CompressedTensors.from_config(config(config_groups=groups))
    bits = [found.scheme(module, headers()).bits for module in (P, Q, "model.layers.0.self_attn.q_proj")]
    assert bits == [4, 3, 2]


@pytest.mark.parametrize("ignore", [[P], ["re:.*up_proj"]])
def test_quantized_tensors_of_an_ignored_module_are_a_contradiction(ignore: list[str]) -> None:
    with pytest.raises(InputError, match=r"up_proj has a weight_packed, although .* not quantized"):
        CompressedTensors.from_config(config(ignore=ignore)).scheme(P, headers())


def test_modules_without_quantized_tensors_are_dense() -> None:
    found = CompressedTensors.from_config(config())
    assert found.scheme(P, {"weight": TensorHeader(torch.bfloat16, (16, 64))}) is None
    assert found.scheme("lm_head", {"weight": TensorHeader(torch.bfloat16, (16, 64))}) is None


@pytest.mark.parametrize(
    ("group", "found", "message"),
    [
        ({}, headers(weight_packed=None), "the tensor weight_packed is missing"),
        ({}, headers(weight_shape=None), "the tensor weight_shape is missing"),
        ({}, headers(weight_packed=TensorHeader(torch.int8, (16, 8))), "weight_packed has dtype int8"),
        ({}, headers(weight_scale=TensorHeader(torch.float16, (8, 2))), r"weight_scale has shape \[8, 2\]"),
        ({"weights": arguments(symmetric=False)}, headers(), "the tensor weight_zero_point is missing"),
        (
            {"weights": arguments(symmetric=False)},
            headers(weight_zero_point=TensorHeader(torch.int32, (3, 2))),
            r"weight_zero_point has shape \[3, 2\]",
        ),
        (
            {"weights": arguments(strategy="channel", group_size=None)},
            headers(),
            r"weight_scale has shape \[16, 2\].*strategy 'channel'",
        ),
    ],
)
def test_malformed_tensors_are_named(group: dict[str, Any], found: dict[str, TensorHeader], message: str) -> None:
    with pytest.raises(InputError, match=f"{P}.*{message}"):
        CompressedTensors.from_config(config(group)).scheme(P, found)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_shape", torch.tensor([15, 64]), r"weight_shape is \[15, 64\], but weight_packed has 16 rows"),
        ("weight_shape", torch.tensor([16, 96]), r"weight_shape is \[16, 96\], but weight_scale has 2 groups"),
        ("weight_packed", torch.zeros(16, 7, dtype=torch.int32), "has 7 words for 64 codes of 4 bits, but needs 8"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(
    name: str, value: torch.Tensor, message: str, integer_weight: Fixture
) -> None:
    target = CompressedTensors.for_schemes({P: W4}, [])
    with pytest.raises(InputError, match=message):
        target.read(P, {**target.write(P, integer_weight(W4, 16, 64)), name: value})


def test_int8_codes_of_fewer_bits_must_fit() -> None:
    found = CompressedTensors.from_config(config(format="int-quantized"))
    tensors = {"weight": torch.zeros(4, 32, dtype=torch.int8), "weight_scale": torch.ones(4, 1)}
    tensors["weight"][2, 5] = 8
    with pytest.raises(InputError, match=r"weight\[2, 5\] = 8 does not fit into 4 bits"):
        found.read(P, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (config({"weights": arguments(num_bits=9)}), "9-bit int"),
        (config({"weights": arguments(type="uint")}), "type 'uint' must be 'int' or 'float'"),
        (config({"weights": arguments(num_bits=4, type="float")}), "not readable as 'pack-quantized'"),
        (config({"weights": arguments(bits=4)}), "has the unknown key 'bits'"),
        (config({"weights": arguments(strategy="channel")}), "strategy 'channel' contradicts group_size = 32"),
        (config({"weights": arguments(strategy="block", group_size=...)}), "'block' contradicts"),
        (config({"weights": arguments(dynamic=True)}), "dynamic = True"),
        (config({"input_activations": arguments(symmetric=False, dynamic=True)}), "symmetric = False"),
        (config({"input_activations": arguments(dynamic="local")}), "dynamic = local"),
        (config(format="nvfp4-pack-quantized"), "4-bit int.* is not readable as 'nvfp4-pack-quantized'"),
        (config(format="mxfp6-pack-quantized"), "stored as 'mxfp6-pack-quantized', which is not readable"),
        (config(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not readable"),
        (config(transform_config={"config_groups": {}}), "transform_config is not readable"),
        (config(config_groups={"W4A16": ["Linear"]}), r"the group 'W4A16' is \['Linear'\]"),
        (
            config({"weights": arguments(strategy="block", group_size=..., block_structure=[128])}),
            "two positive integers",
        ),
    ],
)
def test_malformed_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CompressedTensors.from_config(changes)


@pytest.mark.parametrize("structure", [[128, 128], "128x128"])
def test_a_block_structure_may_be_a_list_or_a_text(structure: Any) -> None:
    weights = arguments(num_bits=8, type="float", strategy="block", group_size=..., block_structure=structure)
    found = CompressedTensors.from_config(config({"weights": weights}, format="naive-quantized"))
    stored = {
        "weight": TensorHeader(torch.float8_e4m3fn, (130, 64)),
        "weight_scale": TensorHeader(torch.bfloat16, (2, 1)),
    }
    assert found.scheme(P, stored) == FloatScheme("block", (128, 128))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (IntegerScheme(4, 32, symmetric=False, has_offsets=True), "not real-valued offsets"),
        (IntegerScheme(4, 32, symmetric=True, act_order=True), "dropped the activation order"),
        (KQuantScheme("q4_k"), "cannot hold Q4_K"),
    ],
)
def test_schemes_it_cannot_hold_are_refused_with_the_reason(scheme: Scheme, message: str) -> None:
    with pytest.raises(UsageError, match=f"{P}: .*{message}") as raised:
        CompressedTensors.for_schemes({P: scheme}, [])
    assert raised.value.hint


def test_a_group_size_that_does_not_divide_is_refused_when_writing(integer_weight: Fixture) -> None:
    with pytest.raises(UsageError, match="in_features = 48 to be a multiple of 32"):
        CompressedTensors.for_schemes({P: W4}, []).write(P, integer_weight(W4, 16, 48))


def test_a_module_that_was_not_announced_is_refused(integer_weight: Fixture) -> None:
    target = CompressedTensors.for_schemes({P: W4, Q: W8A8}, [])
    with pytest.raises(UsageError, match="was not announced for this module"):
        target.write(Q, integer_weight(W4, 16, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(dtype: torch.dtype, integer_weight: Fixture, reread: Fixture) -> None:
    weight = integer_weight(W4, 16, 64, dtype=dtype)
    target = CompressedTensors.for_schemes({P: W4}, [])
    assert torch.equal(reread(target).read(P, target.write(P, weight))["scales"], weight["scales"])
