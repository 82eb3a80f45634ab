"""What GGUF holds exactly is read by gguf-py to the same bits; what it cannot hold is refused with the reason."""

import gguf
import pytest
import torch

from aphroquant.errors import UsageError
from aphroquant.formats.gguf import block_type, decode, encode, exact_type, in_type
from aphroquant.schemes import (
    ActivationScheme,
    AdditiveScheme,
    AffineScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)


def integer_weight(scheme: IntegerScheme, rows: int, columns: int, dtype: torch.dtype) -> QuantizedWeight:
    shapes = scheme.shapes(rows, columns)
    tensors = {"codes": torch.randint(0, 2**scheme.bits, shapes["codes"], dtype=torch.uint8)}
    tensors["scales"] = (torch.randn(shapes["scales"]) * 0.1).to(torch.bfloat16).to(dtype)  # of either sign
    if "zeros" in shapes:
        tensors["zeros"] = torch.randint(0, 2**scheme.bits, shapes["zeros"], dtype=torch.uint8)
        tensors["zeros"][0, 0], tensors["codes"][0, 0] = 2**scheme.bits - 1, 0  # the widest differences
        tensors["zeros"][1, 0], tensors["codes"][1, 0] = 0, 2**scheme.bits - 1
    if "offsets" in shapes:
        tensors["offsets"] = torch.randn(shapes["offsets"]).to(dtype)
    return QuantizedWeight(scheme, tensors, (rows, columns))


def assert_held(weight: QuantizedWeight, expected_type: str) -> None:
    kind = exact_type("layer", weight.scheme, weight.shape[1])
    assert kind.name == expected_type
    held = in_type("layer", weight, kind)
    held.check("layer")
    assert held.scheme == kind.scheme
    data = encode(kind, held)
    original = weight.dequantize()
    theirs = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind.name]))
    assert torch.equal(theirs, original)
    ours = decode(kind, data.flatten(), weight.shape).dequantize()
    assert torch.equal(ours.view(torch.int32), original.view(torch.int32))


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [
        *((bits, True, "Q4_0") for bits in (1, 2, 3, 4)),
        (5, True, "Q5_0"),
        *((bits, True, "Q8_0") for bits in (6, 7, 8)),
        *((bits, False, "Q4_0") for bits in (1, 2, 3)),
        (4, False, "Q5_0"),
        *((bits, False, "Q8_0") for bits in (5, 6, 7)),
    ],
)
def test_integer_codes_in_groups_of_whole_blocks_are_held_exactly(
    bits: int, symmetric: bool, expected: str, group_size: int | None, dtype: torch.dtype
) -> None:
    assert_held(integer_weight(IntegerScheme(bits, group_size, symmetric), 3, 384, dtype), expected)


@pytest.mark.parametrize(("bits", "expected"), [(2, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")])
@pytest.mark.parametrize("group_size", [32, 64])
def test_real_offsets_are_held_exactly(bits: int, group_size: int, expected: str) -> None:
    scheme = IntegerScheme(bits, group_size, symmetric=False, has_offsets=True)
    assert_held(integer_weight(scheme, 3, 192, torch.float16), expected)


def test_a_last_group_that_is_shorter_is_held_too() -> None:
    assert_held(integer_weight(IntegerScheme(4, 128, symmetric=True), 2, 160, torch.float16), "Q4_0")


def test_a_single_group_of_any_size_is_held() -> None:
    assert_held(integer_weight(IntegerScheme(4, 100, symmetric=True), 2, 96, torch.float16), "Q4_0")


def test_a_zero_point_one_beyond_the_codes_is_held() -> None:
    """GPTQ's stored zero points plus one reach 16."""
    weight = integer_weight(IntegerScheme(4, 32, symmetric=False), 2, 64, torch.float16)
    weight["zeros"].fill_(16)
    assert_held(weight, "Q5_0")


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_super_blocks_hold_themselves(kind: str) -> None:
    target = block_type(kind)
    data = torch.randint(0, 60, (2, target.row_bytes(512)), dtype=torch.uint8)
    assert_held(decode(target, data.flatten(), (2, 512)), kind.upper())


def test_microscaling_blocks_are_held_exactly() -> None:
    scheme = LookupScheme("e2m1", 32, "e8m0")
    exponents = torch.randint(90, 140, (3, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors = {"codes": torch.randint(0, 16, (3, 64), dtype=torch.uint8), "scales": exponents}
    assert_held(QuantizedWeight(scheme, tensors, (3, 64)), "MXFP4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_weights_stay_in_their_dtype(dtype: torch.dtype) -> None:
    weight = QuantizedWeight.dense(torch.randn(2, 5).to(dtype))
    kind = exact_type("layer", weight.scheme, 5)
    assert kind.scheme == DenseScheme(dtype)
    assert in_type("layer", weight, kind) is weight


@pytest.mark.parametrize(
    ("scheme", "columns", "message"),
    [
        (IntegerScheme(8, 32, symmetric=False), 64, "at most 8 bits with zero points exactly, and .* needs 9"),
        (IntegerScheme(8, 32, symmetric=False, has_offsets=True), 64, "at most 5 bits with offsets exactly"),
        (IntegerScheme(4, 16, symmetric=True), 64, "groups of 16 cut through it"),
        (IntegerScheme(4, 48, symmetric=True), 96, "groups of 48 cut through it"),
        (IntegerScheme(4, None, symmetric=True), 80, "Q4_0 needs rows that are a multiple of 32, not 80"),
        (IntegerScheme(4, 32, symmetric=True, act_order=True), 64, "no order of columns"),
        (IntegerScheme(8, None, True, activations=ActivationScheme("int")), 64, "no quantized inputs"),
        (KQuantScheme("q4_k"), 288, "Q4_K needs rows that are a multiple of 256, not 288"),
        (LookupScheme("nf4", 64, "float", flattened=True), 64, "GGUF has no type for nf4 g64 flat"),
        (LookupScheme("e2m1", 32, "e8m0", activations=ActivationScheme("float")), 64, "no quantized inputs"),
        (FloatScheme("channel"), 64, "GGUF has no type for fp8 per channel"),
        (AdditiveScheme(1, 16), 64, "GGUF has no type for additive"),
        (AffineScheme(4, 64), 64, "GGUF has no type for int4 real zeros g64"),
    ],
)
def test_what_cannot_be_held_is_refused_with_the_reason(scheme: Scheme, columns: int, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^layer: .*{message}") as caught:
        exact_type("layer", scheme, columns)
    assert "quantized anew" in str(caught.value.hint)


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    weight = integer_weight(IntegerScheme(4, 32, symmetric=True), 2, 64, torch.float32)
    weight["scales"][1, 1] = 1 / 3
    with pytest.raises(
        UsageError, match=r"layer: scales\[1, 1\] = 0\.333.* is between two numbers of float16 \(the nearest is 0\.33"
    ):
        in_type("layer", weight, block_type("Q4_0"))


def test_codes_wider_than_their_bits_are_refused() -> None:
    weight = integer_weight(IntegerScheme(4, 32, symmetric=True), 2, 64, torch.float16)
    weight["codes"][0, 0] = 16
    with pytest.raises(UsageError, match="layer: codes or zero points are wider than the 4 bits"):
        in_type("layer", weight, block_type("Q4_0"))


def test_negative_scales_are_refused_where_the_type_has_no_sign() -> None:
    scheme = LookupScheme("e2m1", 16, "e4m3")
    scales = torch.ones(1, 4)
    tensors = {"codes": torch.zeros(1, 64, dtype=torch.uint8), "global_scale": torch.tensor(1.0, dtype=torch.float64)}
    held = in_type(
        "layer",
        QuantizedWeight(scheme, {**tensors, "scales": scales.to(torch.float8_e4m3fn)}, (1, 64)),
        block_type("NVFP4"),
    )
    assert held.scheme == scheme
    scales[0, 2] = -1
    weight = QuantizedWeight(scheme, {**tensors, "scales": scales.to(torch.float8_e4m3fn)}, (1, 64))
    with pytest.raises(UsageError, match="layer: a scale is negative"):
        in_type("layer", weight, block_type("NVFP4"))
