"""Dequantization is what the scheme's formula says, judged in float64 by scalar loops."""

from __future__ import annotations

import pickle

import pytest
import torch

from aphroquant.errors import InputError, UsageError
from aphroquant.kernels.random_weights import random_weight
from aphroquant.numbers import same_bytes
from aphroquant.schemes import (
    ActivationScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)


def integer_weight(scheme: IntegerScheme, n: int = 5, k: int = 24, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.num_groups(k)
    tensors = {
        "codes": torch.randint(0, 2**scheme.bits, (n, k), generator=generator, dtype=torch.uint8),
        "scales": torch.randn(n, groups, generator=generator).half(),
    }
    if scheme.has_offsets:
        tensors["offsets"] = torch.randn(n, groups, generator=generator).half()
    elif not scheme.symmetric:
        tensors["zeros"] = torch.randint(0, 2**scheme.bits, (n, groups), generator=generator, dtype=torch.uint8)
    if scheme.act_order:
        tensors["group_index"] = torch.randint(0, groups, (k,), generator=generator, dtype=torch.int32)
    return QuantizedWeight(scheme, tensors, (n, k))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [7, 8, 24, None])
@pytest.mark.parametrize(
    "kind", [{"symmetric": True}, {"symmetric": False}, {"symmetric": False, "has_offsets": True}], ids=str
)
@pytest.mark.parametrize("act_order", [False, True])
def test_integer_weights_follow_the_formula(
    bits: int, group_size: int | None, kind: dict[str, bool], act_order: bool
) -> None:
    scheme = IntegerScheme(bits, group_size, act_order=act_order, **kind)
    weight = integer_weight(scheme)
    weight.check("layer")
    dequantized = weight.dequantize(torch.float64)
    for row in range(5):
        for column in range(24):
            group = int(weight["group_index"][column]) if act_order else column // (group_size or 24)
            code, scale = int(weight["codes"][row, column]), float(weight["scales"][row, group])
            if scheme.has_offsets:
                expected = code * scale + float(weight["offsets"][row, group])
            else:
                zero = 2 ** (bits - 1) if scheme.symmetric else int(weight["zeros"][row, group])
                expected = (code - zero) * scale
            assert float(dequantized[row, column]) == expected


def test_block_scales_cover_partial_edge_blocks() -> None:
    codes = torch.randn(130, 200).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2)
    weight = QuantizedWeight(FloatScheme("block", (128, 128)), {"codes": codes, "scales": scales}, (130, 200))
    weight.check("layer")
    dequantized = weight.dequantize()
    assert dequantized.shape == (130, 200)
    for row, column in [(0, 0), (127, 127), (128, 127), (129, 199), (0, 128)]:
        assert dequantized[row, column] == codes[row, column].float() * scales[row // 128, column // 128]


def test_a_dense_weight_comes_back_as_it_was() -> None:
    tensor = torch.randn(3, 4).bfloat16()
    assert torch.equal(QuantizedWeight.dense(tensor).dequantize(torch.bfloat16), tensor)


def test_check_names_the_missing_or_misshapen_tensor() -> None:
    weight = integer_weight(IntegerScheme(4, 8, symmetric=False))
    missing = {name: tensor for name, tensor in weight.tensors.items() if name != "zeros"}
    with pytest.raises(InputError, match=r"layer: .* no zeros"):
        QuantizedWeight(weight.scheme, missing, weight.shape).check("layer")
    with pytest.raises(InputError, match=r"scales has shape \[5, 2\]"):
        QuantizedWeight(weight.scheme, {**weight.tensors, "scales": weight["scales"][:, :2]}, weight.shape).check("x")


@pytest.mark.parametrize(
    "make",
    [
        lambda: IntegerScheme(9, 64, True),
        lambda: IntegerScheme(4, 0, True),
        lambda: IntegerScheme(4, 64, True, has_offsets=True),
        lambda: FloatScheme("block"),
        lambda: FloatScheme("tensor", (128, 128)),
        lambda: ActivationScheme("int", granularity="group"),
    ],
)
def test_contradicting_schemes_are_refused(make: object) -> None:
    with pytest.raises(UsageError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("weight", "bits"),
    [
        (integer_weight(IntegerScheme(4, 8, symmetric=False), n=2, k=16), 32 * 4 + 4 * 16 + 4 * 4),
        (integer_weight(IntegerScheme(3, 8, symmetric=True), n=2, k=16), 32 * 3 + 4 * 16),
        (QuantizedWeight.dense(torch.zeros(2, 16)), 32 * 32),
    ],
)
def test_bits_count_codes_at_their_width(weight: QuantizedWeight, bits: int) -> None:
    assert weight.num_bits == bits


def test_a_q4_k_block_costs_four_and_a_half_bits_a_weight() -> None:
    tensors = {
        "codes": torch.zeros(1, 256, dtype=torch.uint8),
        "d": torch.zeros(1, 1, dtype=torch.float16),
        "dmin": torch.zeros(1, 1, dtype=torch.float16),
        "sub_scales": torch.zeros(1, 8, dtype=torch.uint8),
        "sub_mins": torch.zeros(1, 8, dtype=torch.uint8),
    }
    weight = QuantizedWeight(KQuantScheme("q4_k"), tensors, (1, 256))
    weight.check("layer")
    assert weight.num_bits == 144 * 8


def test_schemes_read_well() -> None:
    assert str(IntegerScheme(4, 64, symmetric=False)) == "int4 asym g64"
    assert (
        str(IntegerScheme(8, None, symmetric=True, activations=ActivationScheme("int")))
        == "int8 sym channel x int8 inputs"
    )
    assert str(FloatScheme("block", (128, 128))) == "fp8 block 128x128"
    assert str(DenseScheme(torch.bfloat16)) == "bfloat16"


@pytest.mark.parametrize(
    "scheme", [FloatScheme("channel"), LookupScheme("e2m1", 16, "e4m3"), IntegerScheme(4, 16, False)], ids=str
)
def test_weights_are_the_same_behind_a_pickle(scheme: Scheme) -> None:
    weight = random_weight(scheme, 8, 32)
    found = pickle.loads(pickle.dumps(weight))
    assert (found.scheme, found.shape) == (weight.scheme, weight.shape)
    assert all(same_bytes(found[name], tensor) for name, tensor in weight.tensors.items())
