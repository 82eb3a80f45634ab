"""AWQ: the sentences of its specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aphroquant.errors import InputError, UsageError
from aphroquant.formats.awq import Awq
from aphroquant.formats.base import TensorHeader
from aphroquant.schemes import ActivationScheme, DenseScheme, FloatScheme, IntegerScheme, QuantizedWeight

Fixture = Callable[..., Any]
P = "model.layers.3.self_attn.q_proj"
ASYM = IntegerScheme(4, 32, symmetric=False)
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def headers(k: int = 64, n: int = 16, groups: int = 2, **changes: TensorHeader | None) -> dict[str, TensorHeader]:
    found: dict[str, TensorHeader | None] = {
        "qweight": TensorHeader(torch.int32, (k, n // 8)),
        "qzeros": TensorHeader(torch.int32, (groups, n // 8)),
        "scales": TensorHeader(torch.float16, (groups, n)),
        **changes,
    }
    return {name: header for name, header in found.items() if header is not None}


def test_the_config_is_what_the_field_writes() -> None:
    written = Awq.for_schemes({P: ASYM}, ["lm_head"]).quantization_config()
    assert written == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "sym": False,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


def test_shapes_and_dtypes_are_those_of_the_layout(integer_weight: Fixture) -> None:
    tensors = Awq.for_schemes({P: ASYM}, []).write(P, integer_weight(ASYM, 16, 64))
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert found == {
        "qweight": (torch.int32, (64, 2)),
        "qzeros": (torch.int32, (2, 2)),
        "scales": (torch.float16, (2, 16)),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_columns_are_interleaved_within_a_word() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 32).contiguous()  # row n has the code n
    tensors = {"codes": codes, "scales": torch.ones(8, 1), "zeros": torch.zeros(8, 1, dtype=torch.uint8)}
    written = Awq.for_schemes({P: ASYM}, []).write(P, QuantizedWeight(ASYM, tensors, (8, 32)))
    assert written["qweight"].unique().tolist() == [0x75316420]


def test_symmetric_weights_are_written_with_zero_points_of_8(integer_weight: Fixture, reread: Fixture) -> None:
    scheme = IntegerScheme(4, 32, symmetric=True)
    written = Awq.for_schemes({P: scheme}, [])
    tensors = written.write(P, integer_weight(scheme, 16, 64))
    assert tensors["qzeros"].unique().tolist() == [-0x77777778]
    assert written.quantization_config()["zero_point"] is True
    assert reread(written).read(P, tensors).scheme == scheme


def test_old_quant_config_files_are_understood() -> None:
    old = Awq.from_config({"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"})
    assert (old.group_size, old.symmetric) == (128, False)


def test_without_zero_point_the_weight_is_symmetric_and_needs_no_qzeros() -> None:
    found = Awq.from_config({**CONFIG, "zero_point": False}).scheme(P, headers(qzeros=None))
    assert found == IntegerScheme(4, 32, symmetric=True)


def test_symmetric_files_with_other_zero_points_are_refused(integer_weight: Fixture) -> None:
    tensors = Awq.for_schemes({P: ASYM}, []).write(P, integer_weight(ASYM, 16, 64))
    with pytest.raises(InputError, match=r"q_proj\.qzeros are not all 8"):
        Awq.from_config({**CONFIG, "zero_point": False}).read(P, tensors)


def test_group_size_minus_1_is_one_group_a_row(integer_weight: Fixture, reread: Fixture) -> None:
    scheme = IntegerScheme(4, None, symmetric=False)
    written = Awq.for_schemes({P: scheme}, [])
    assert written.quantization_config()["group_size"] == -1
    assert reread(written).read(P, written.write(P, integer_weight(scheme, 8, 24))).scheme == scheme


def test_modules_without_qweight_are_dense() -> None:
    assert Awq.from_config(CONFIG).scheme(P, {"weight": TensorHeader(torch.float16, (16, 64))}) is None
    assert Awq.from_config(CONFIG).scheme("mlp.act", {"scales": TensorHeader(torch.float16, (64,))}) is None


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (headers(qzeros=None), "q_proj: the tensor qzeros is missing"),
        (headers(scales=TensorHeader(torch.float16, (2, 8))), r"q_proj\.scales has shape \[2, 8\].* need \[2, 16\]"),
        (headers(groups=4), r"q_proj\.scales has shape \[4, 16\]"),
        (headers(k=48, groups=1), "q_proj: group_size = 32 does not divide in_features = 48"),
        (headers(qweight=TensorHeader(torch.int16, (64, 2))), r"q_proj\.qweight has dtype int16, but must be int32"),
        (headers(qweight=TensorHeader(torch.int32, (64,))), r"q_proj\.qweight has shape \[64\], but must be a matrix"),
        (headers(scales=TensorHeader(torch.int8, (2, 16))), r"q_proj\.scales has dtype int8"),
    ],
)
def test_malformed_tensors_are_named(found: dict[str, TensorHeader], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Awq.from_config(CONFIG).scheme(P, found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "marlin"}, "AWQ version 'marlin' is not readable"),
        ({"bits": 8}, "AWQ has 4 bits, not 8"),
        ({"bits": "4"}, "bits = '4' must be an integer"),
        ({"group_size": 0}, "group_size = 0 must be positive"),
        ({"group_size": None}, "has no group_size or q_group_size"),
        ({"zero_point": 1}, "zero_point = 1 must be true or false"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of strings"),
    ],
)
def test_malformed_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Awq.from_config({**CONFIG, **changes})


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (IntegerScheme(8, 32, symmetric=True), "awq holds 4 bits, not 8"),
        (IntegerScheme(4, 32, symmetric=False, has_offsets=True), "not real-valued offsets"),
        (IntegerScheme(4, 32, symmetric=True, act_order=True), "no activation order"),
        (IntegerScheme(4, 32, symmetric=True, activations=ActivationScheme("int")), "no quantized inputs"),
        (FloatScheme("tensor"), "awq holds integer codes, not fp8"),
    ],
)
def test_schemes_it_cannot_hold_are_refused_with_the_reason(scheme: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"{P}: .*{message}") as raised:
        Awq.for_schemes({P: scheme}, [])
    assert raised.value.hint


def test_a_quantized_head_is_refused_since_awq_s_readers_expect_a_dense_one() -> None:
    with pytest.raises(UsageError, match="lm_head: awq's readers take it for dense"):
        Awq.for_schemes({P: ASYM, "lm_head": ASYM}, [])


def test_one_group_size_for_all_modules() -> None:
    with pytest.raises(UsageError, match="one group size for all modules, but a has 32 and b 64"):
        Awq.for_schemes({"a": ASYM, "b": IntegerScheme(4, 64, symmetric=False)}, [])


def test_a_dense_name_within_a_quantized_name_is_refused() -> None:
    with pytest.raises(UsageError, match=r"leave mlp\.gate dense and quantize mlp\.gate_proj"):
        Awq.for_schemes({"mlp.gate_proj": ASYM}, ["mlp.gate"])
    with pytest.raises(UsageError, match=r"leave mlp\.gate dense"):
        Awq.for_schemes({"mlp.gate_proj": ASYM, "mlp.gate": DenseScheme(torch.float16)}, [])


def test_bfloat16_scales_are_cast_only_if_nothing_changes(integer_weight: Fixture) -> None:
    written = Awq.for_schemes({P: ASYM}, [])
    weight = integer_weight(ASYM, 8, 64, dtype=torch.bfloat16)
    assert torch.equal(written.write(P, weight)["scales"].T.float(), weight["scales"].float())
    no_number = "is no finite number"
    problems = {
        1e30: r"is beyond the largest float16 \(65504\)",
        1e-20: r"is below the range of float16 \(.* become 0\)",
    }
    for value, problem in {**problems, float("nan"): no_number, float("inf"): no_number}.items():
        weight["scales"][5, 1] = value
        with pytest.raises(UsageError, match=rf"{P}: scales\[5, 1\] = .* {problem}.*, and awq stores float16"):
            written.write(P, weight)


@pytest.mark.parametrize(("n", "k", "message"), [(12, 64, "out_features = 12"), (16, 48, "in_features = 48")])
def test_sizes_that_do_not_fit_are_refused_when_writing(n: int, k: int, message: str, integer_weight: Fixture) -> None:
    with pytest.raises(UsageError, match=message):
        Awq.for_schemes({P: ASYM}, []).write(P, integer_weight(ASYM, n, k))


def test_a_weight_of_another_scheme_than_announced_is_refused(integer_weight: Fixture) -> None:
    with pytest.raises(UsageError, match="was announced"):
        Awq.for_schemes({P: ASYM}, []).write(P, integer_weight(IntegerScheme(4, 64, symmetric=False), 8, 64))


def test_codes_wider_than_the_scheme_are_refused(integer_weight: Fixture) -> None:
    weight = integer_weight(ASYM, 8, 64)
    weight["codes"][3, 3] = 16
    with pytest.raises(UsageError, match="codes has the value 16"):
        Awq.for_schemes({P: ASYM}, []).write(P, weight)
