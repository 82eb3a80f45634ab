"""Packed integer weights hold every code where the matrix instructions' fragments want it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda.integer.packing import (
    chunk_bytes,
    group_lines,
    pack,
    pack_codes,
    ungroup_lines,
    unpack,
    unpack_codes,
)
from aphroquant.schemes import IntegerScheme, QuantizedWeight

KINDS = {
    "symmetric": {"symmetric": True},
    "asymmetric": {},
    "offsets": {"has_offsets": True},
    "act-order": {"act_order": True},
    "symmetric act-order": {"symmetric": True, "act_order": True},
}
SHAPES = [(64, 128, 128), (96, 256, 64), (1, 1, None), (70, 200, 32), (130, 384, None), (65, 130, 13), (33, 96, 96)]


def integer_weight(bits: int, shape: tuple[int, int, int | None], **kind: bool) -> QuantizedWeight:
    n, k, group_size = shape
    scheme = IntegerScheme(bits, group_size, **({"symmetric": False} | kind))
    groups = scheme.num_groups(k)
    tensors = {
        "codes": torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        "scales": (torch.randn(n, groups) * 0.01).half(),
    }
    if scheme.has_offsets:
        tensors["offsets"] = (torch.randn(n, groups) * 0.05).half()
    elif not scheme.symmetric:
        tensors["zeros"] = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
    if scheme.act_order:
        tensors["group_index"] = (torch.arange(k) // (group_size or k))[torch.randperm(k)].int()
    return QuantizedWeight(scheme, tensors, (n, k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_packed_weight_is_the_same_weight(bits: int, shape: tuple[int, int, int | None], kind: str) -> None:
    weight = integer_weight(bits, shape, **KINDS[kind])
    assert torch.equal(unpack(pack(weight), torch.float64), weight.dequantize(torch.float64))


def test_groups_of_unequal_sizes_are_padded() -> None:
    weight = integer_weight(4, (64, 256, 64), act_order=True)
    index = torch.tensor([0] * 100 + [1] * 28 + [2] * 64 + [3] * 64)[torch.randperm(256)].int()
    weight = QuantizedWeight(weight.scheme, {**weight.tensors, "group_index": index}, weight.shape)
    assert torch.equal(unpack(pack(weight), torch.float64), weight.dequantize(torch.float64))


def test_zero_points_far_from_the_codes_become_offsets() -> None:
    weight = integer_weight(4, (64, 256, 64))
    weight = QuantizedWeight(weight.scheme, {**weight.tensors, "zeros": weight["zeros"] + 200}, weight.shape)
    packed = pack(weight)
    assert packed.zeros is None
    assert torch.equal(unpack(packed, torch.float64), weight.dequantize(torch.float64))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_survive_packing(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (128, 256), dtype=torch.uint8)
    packed = pack_codes(codes, bits, 0, None, 256)
    assert packed.shape == (2, 4, chunk_bytes(bits))
    assert packed.shape[2] * 8 == 64 * 64 * bits
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_group_lines_survive() -> None:
    values = torch.randn(100, 3)
    assert torch.equal(ungroup_lines(group_lines(values))[:100], values)


def words(packed: Tensor, super_row: int, chunk: int) -> Tensor:
    return packed[super_row, chunk].view(torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_shift_and_a_mask_give_the_fragment_registers(bits: int) -> None:
    """Reads codes by the bit positions that the kernels use, and finds them at the fragment's rows and columns."""
    codes = torch.randint(0, 2**bits, (64, 128), dtype=torch.uint8)
    packed = pack_codes(codes, bits, 0, None, 128)
    for chunk in range(2):
        line = words(packed, 0, chunk).view(4, -1)
        for tile in range(4):
            for lane in range(32):
                for step in range(4):
                    for register in range(4):
                        row = tile * 16 + lane // 4 + 8 * (register & 1)
                        column = chunk * 64 + step * 16 + 2 * (lane % 4) + 8 * (register >> 1)
                        found = fragment(line[tile], bits, lane, step, register)
                        assert found == (int(codes[row, column]), int(codes[row, column + 1]))


def fragment(line: Tensor, bits: int, lane: int, step: int, register: int) -> tuple[int, int]:
    mask = 2**bits - 1
    if bits == 8:
        word = int(line[step // 2 * 128 + lane * 4 + step % 2 * 2 + register // 2]) >> (8 * (register % 2))
        return word & mask, word >> 16 & mask
    if bits == 4:
        word = int(line[lane * 4 + step]) >> (4 * register)
        return word & mask, word >> 16 & mask
    pair, half = step % 2 * 4 + register, step // 2
    word = int(line[lane * 2 + half]) >> (2 * pair)
    low = word & 3, word >> 16 & 3
    if bits == 2:
        return low
    high = int(line[64 + lane]) >> (2 * pair + half)
    return low[0] + 4 * (high & 1), low[1] + 4 * (high >> 16 & 1)


def test_scales_of_a_lane_are_contiguous() -> None:
    line = group_lines(torch.arange(64.0)[:, None])[0, 0]
    for lane in range(32):
        rows = [tile * 16 + 8 * half + lane // 4 for tile in range(4) for half in (0, 1)]
        assert line[lane // 4 * 8 : lane // 4 * 8 + 8].tolist() == rows
