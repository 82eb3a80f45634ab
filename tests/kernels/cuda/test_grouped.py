"""Products with the weights of several experts against float64, on a GPU or emulated."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda.float8.quantize import Granularity
from aphroquant.kernels.cuda.float8.wgmma import Float8Tile
from aphroquant.kernels.cuda.grouped import routing
from aphroquant.kernels.cuda.grouped.choosing import choose_experts
from aphroquant.kernels.cuda.grouped.inputs import gather_inputs, quantize_inputs
from aphroquant.kernels.cuda.grouped.multiply import decode_multiply, float8_multiply, mma_multiply, wgmma_multiply
from aphroquant.kernels.cuda.grouped.routing import TILE_SIZES, CudaTokenGroups, combine, group_tokens
from aphroquant.kernels.cuda.grouped.stacking import stack_biases, stack_integers
from aphroquant.kernels.cuda.integer.decode_plan import DecodePlan
from aphroquant.kernels.cuda.integer.mma import MmaTile
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.reference import grouped as reference
from aphroquant.schemes import IntegerScheme, QuantizedWeight, Scheme

# Relative error in the norm: what rounding weights and outputs does, and no more.
TOLERANCE = 3.5e-3
SCHEMES = {
    "4 bits": IntegerScheme(4, 64, True),
    "4 bits, zeros": IntegerScheme(4, 32, False),
    "4 bits, offsets": IntegerScheme(4, 64, False, has_offsets=True),
    "4 bits, act-order": IntegerScheme(4, 64, False, act_order=True),
    "8 bits, channel": IntegerScheme(8, None, True),
}


def expert_ids(tokens: int, top_k: int, experts: int, device: torch.device) -> Tensor:
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]) if tokens else torch.empty(0, top_k)
    return ids.to(device, torch.int64)


def expected_product(
    x: Tensor, groups: CudaTokenGroups, weights: list[QuantizedWeight], biases: list[Tensor] | None
) -> Tensor:
    """Of every pair in use, [T * k, N] by pair, in float64."""
    places, offsets = groups.places.cpu().flatten(), groups.offsets.cpu()
    rows = []
    for pair, place in enumerate(places.tolist()):
        expert = int(torch.searchsorted(offsets, place, right=True)) - 1
        bias = 0 if biases is None else biases[expert].cpu().double()
        token = x[pair // groups.places.shape[1]].cpu().double()
        rows.append(weights[expert].dequantize(torch.float64).cpu() @ token + bias)
    return torch.stack(rows)


def in_pairs(out: Tensor, groups: CudaTokenGroups) -> Tensor:
    return out.cpu().double()[groups.places.cpu().flatten().long()]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def experts_of(scheme: Scheme, shape: tuple[int, int], count: int) -> tuple[list[QuantizedWeight], list[Tensor]]:
    return [random_weight(scheme, *shape) for _ in range(count)], [torch.randn(shape[0]) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 1, 1), (1, 8, 8), (7, 2, 5), (70, 4, 40), (300, 3, 8), (129, 1, 128)]
)
def test_pairs_are_sorted_by_expert(
    tokens: int, top_k: int, experts: int, dtype: torch.dtype, device: torch.device
) -> None:
    ids = expert_ids(tokens, top_k, experts, device).to(dtype)
    found, expected = group_tokens(ids, experts), reference.group_tokens(ids.cpu(), experts)
    for name in ("rows", "places", "offsets"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert torch.equal(found.owners.cpu(), ids.cpu().flatten().sort(stable=True).values.int())
    check_tiles(found)


def test_several_blocks_sort_as_one_does(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "num_blocks", lambda pairs: 4)
    ids = expert_ids(400, 3, 9, device)
    ids[5, 1] = -1
    found, expected = group_tokens(ids, 9), reference.group_tokens(ids.cpu(), 9)
    used = int(expected.offsets[-1])
    assert torch.equal(found.rows.cpu()[:used], expected.rows[:used])
    assert torch.equal(found.places.cpu(), expected.places) and torch.equal(found.offsets.cpu(), expected.offsets)
    check_tiles(found)


@pytest.mark.parametrize("tokens", [1, 33, 280])
def test_all_pairs_may_have_one_expert(tokens: int, device: torch.device) -> None:
    groups = group_tokens(torch.full((tokens, 2), 2, device=device), 6)
    assert groups.offsets.cpu().tolist() == [0, 0, 0, *[2 * tokens] * 4]
    assert torch.equal(groups.places.cpu().flatten(), torch.arange(2 * tokens).int())
    check_tiles(groups)


def test_ids_that_are_no_experts_have_no_place(device: torch.device) -> None:
    ids = torch.tensor([[3, -1], [0, 4], [9, 3]], device=device)
    groups = group_tokens(ids, 4)
    assert groups.places.cpu().tolist() == [[1, -1], [0, -1], [-1, 2]]
    assert groups.offsets.cpu().tolist() == [0, 1, 1, 1, 3]
    assert groups.rows.cpu().tolist()[:3] == [1, 0, 2]
    check_tiles(groups)
    y = torch.randn(6, 16, device=device).bfloat16()
    y[3:] = torch.nan
    out = combine(y, groups, torch.ones(3, 2, device=device))
    assert torch.equal(out, y[[1, 0, 2]])


def check_tiles(groups: CudaTokenGroups) -> None:
    """Tiles cover each expert's places once, and its scales begin at a multiple of 4 of their own."""
    offsets, lines = groups.offsets.cpu().tolist(), groups.lines.cpu().tolist()
    used = offsets[-1]
    assert len(set(lines[:used])) == used and all(line < groups.line_length - TILE_SIZES[-1] for line in lines[:used])
    for index, size in enumerate(TILE_SIZES):
        count = int(groups.counts[index])
        assert count <= groups.most_tiles(size)
        tiles = groups.tiles[index][:count].cpu().tolist()
        expected = [
            [expert, first, min(first + size, end), lines[first]]
            for expert, (start, end) in enumerate(itertools.pairwise(offsets))
            for first in range(start, end, size)
        ]
        assert tiles == expected
        assert all(tile[3] % 4 == 0 for tile in tiles)


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (9, 128, 8), (6, 40, 1), (3, 5, 5)])
def test_experts_are_those_of_the_largest_logits(
    tokens: int, experts: int, top_k: int, normalizes: bool, device: torch.device
) -> None:
    logits = torch.randn(tokens, experts, device=device) * 3
    found = choose_experts(logits, top_k, normalizes)
    expected = logits.topk(top_k).indices
    assert torch.equal(found.ids.long(), expected)
    shares = torch.softmax(logits.double(), -1).gather(1, expected)
    if normalizes:
        shares /= shares.sum(1, keepdim=True)
    torch.testing.assert_close(found.weights.double(), shares, rtol=1e-5, atol=1e-7)


def test_equal_logits_take_the_lower_experts_and_broken_ones_none(device: torch.device) -> None:
    logits = torch.zeros(2, 40, device=device)
    logits[1] = torch.nan
    found = choose_experts(logits, 3, True)
    assert found.ids.cpu().tolist() == [[0, 1, 2], [-1, -1, -1]]
    assert found.weights[0].isfinite().all() and found.weights[1].isnan().all()


@pytest.mark.parametrize(("top_k", "columns"), [(1, 40), (3, 8), (8, 37)])
def test_results_are_weighted_and_added_up(top_k: int, columns: int, device: torch.device) -> None:
    ids = expert_ids(5, top_k, 9, device)
    groups = group_tokens(ids, 9)
    y, weights = torch.randn(5 * top_k, columns, device=device).half(), torch.rand(5, top_k, device=device)
    found = combine(y, groups, weights)
    assert torch.equal(found, reference.combine(y, groups.places, weights))
    expected = (weights[..., None].double() * y.double()[groups.places.long()]).sum(1)
    assert relative_error(found.cpu().double(), expected.cpu()) < 1e-3


@pytest.mark.parametrize(("name", "in_order"), [(name, name == "4 bits") for name in SCHEMES])
def test_decode_multiplies_each_token_by_its_experts(name: str, in_order: bool, device: torch.device) -> None:
    weights, biases = experts_of(SCHEMES[name], (70, 256), 5)
    packed, bias = stack_integers(weights, device), stack_biases(biases, device)
    groups = group_tokens(expert_ids(11, 2, 5, device), 5)
    x = torch.randn(11, 256, device=device).bfloat16()
    out = torch.full((22, 70), torch.nan, device=device).bfloat16()
    given = x[groups.rows.long()] if in_order else x
    decode_multiply(packed, given, groups, bias, DecodePlan(1, 2, 1, 2, 2), 8, out, in_order)
    assert relative_error(in_pairs(out, groups), expected_product(x, groups, weights, biases)) < TOLERANCE


@pytest.mark.parametrize("name", ["4 bits, offsets", "4 bits, act-order", "8 bits, channel"])
def test_mma_multiplies_each_token_by_its_experts(name: str, device: torch.device) -> None:
    weights, biases = experts_of(SCHEMES[name], (133, 192), 4)
    packed, bias = stack_integers(weights, device), stack_biases(biases, device)
    groups = group_tokens(expert_ids(21, 2, 4, device), 4)
    x = torch.randn(21, 192, device=device).bfloat16()
    out = torch.full((42, 133), torch.nan, device=device).bfloat16()
    inputs = gather_inputs(x, groups, packed.columns, in_order=False)
    mma_multiply(packed, inputs, groups, bias, MmaTile(16, stages=2), 0, out)
    assert relative_error(in_pairs(out, groups), expected_product(x, groups, weights, biases)) < TOLERANCE


@pytest.mark.parametrize(("name", "persistent"), [("4 bits, zeros", True), ("8 bits, channel", False)])
def test_wgmma_multiplies_each_token_by_its_experts(name: str, persistent: bool, device: torch.device) -> None:
    needs_hopper(device)
    weights, biases = experts_of(SCHEMES[name], (133, 192), 4)
    packed, bias = stack_integers(weights, device), stack_biases(biases, device)
    groups = group_tokens(expert_ids(21, 2, 4, device), 4)
    x = torch.randn(21, 192, device=device).bfloat16()
    out = torch.full((42, 133), torch.nan, device=device).bfloat16()
    inputs = gather_inputs(x, groups, packed.columns, in_order=False)
    tile = WgmmaTile(16, warpgroups=1, stages=2, persistent=persistent)
    wgmma_multiply(packed, inputs, groups, bias, tile, 0, out, multiprocessors=3)
    assert relative_error(in_pairs(out, groups), expected_product(x, groups, weights, biases)) < TOLERANCE


def test_wide_tiles_multiply_no_more_tokens_than_they_hold(device: torch.device) -> None:
    needs_hopper(device)
    weights, _ = experts_of(IntegerScheme(4, 64, True), (64, 128), 3)
    packed = stack_integers(weights, device)
    groups = group_tokens(torch.tensor([0] * 9 + [1] * 20 + [2] * 40, device=device)[:, None], 3)
    x, out = torch.randn(69, 128, device=device).bfloat16(), torch.empty(69, 64, device=device).bfloat16()
    inputs = gather_inputs(x, groups, None, in_order=False)
    wgmma_multiply(packed, inputs, groups, None, WgmmaTile(64, warpgroups=1, chunks=1, stages=2), 0, out)
    assert relative_error(in_pairs(out, groups), expected_product(x, groups, weights, None)) < TOLERANCE


@pytest.mark.parametrize("has_blocks", [False, True])
def test_float8_multiplies_each_token_by_its_experts(has_blocks: bool, device: torch.device) -> None:
    needs_hopper(device)
    experts, rows, columns = 3, 200, 256
    codes = torch.randn(experts * rows, columns).to(torch.float8_e4m3fn).to(device)
    scales = torch.rand(experts, 2, 2, device=device) if has_blocks else torch.rand(experts, rows, device=device)
    bias = torch.randn(experts, rows, device=device)
    groups = group_tokens(expert_ids(9, 2, experts, device), experts)
    x = torch.randn(9, columns, device=device).bfloat16()
    tokens = quantize_inputs(x, groups, Granularity.GROUP if has_blocks else Granularity.TOKEN, None, in_order=False)
    out = torch.full((18, rows), torch.nan, device=device).bfloat16()
    tile = Float8Tile(16, warpgroups=1, stages=2)
    block_rows = 128 if has_blocks else None
    float8_multiply(codes, scales, tokens.codes, tokens.scales, groups, bias, tile, out, rows, block_rows=block_rows)
    spread = scales.cpu().double()
    if has_blocks:
        spread = spread.repeat_interleave(128, 1)[:, :rows].repeat_interleave(128, 2)
        places = tokens.scales.cpu().double()[:, groups.lines.cpu().long()].T.repeat_interleave(128, 1)
    else:
        spread, places = spread[..., None], tokens.scales.cpu().double()[:, None]
    matrices = codes.cpu().double().view(experts, rows, columns) * spread
    given = tokens.codes.cpu().double() * places
    owners = groups.owners.cpu().long()
    expected = torch.einsum("pnk,pk->pn", matrices[owners], given) + bias.cpu().double()[owners]
    assert relative_error(out.cpu().double(), expected) < TOLERANCE
    assert relative_error(given, x.cpu().double()[groups.rows.cpu().long()]) < 0.04


def test_inputs_are_quantized_with_the_scale_of_their_expert(device: torch.device) -> None:
    groups = group_tokens(torch.tensor([[1], [0], [2], [1]], device=device), 3)
    x, given = torch.randn(4, 40, device=device).half(), torch.tensor([0.01, 0.02, 0.04], device=device)
    tokens = quantize_inputs(x, groups, Granularity.GIVEN, given, in_order=False)
    assert torch.equal(tokens.scales, given[[0, 1, 1, 2]])
    expected = (x[[1, 0, 3, 2]].float() / tokens.scales[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(tokens.codes[:, :40].float(), expected.float())


def test_experts_with_far_zero_points_are_all_packed_with_offsets(device: torch.device) -> None:
    weights, _ = experts_of(IntegerScheme(4, 64, False), (64, 128), 2)
    far = dict(weights[1].tensors) | {"zeros": torch.full_like(weights[1]["zeros"], 40)}
    weights[1] = QuantizedWeight(weights[1].scheme, far, weights[1].shape)
    packed = stack_integers(weights, device)
    assert packed.zeros is None and packed.offsets is not None
    groups = group_tokens(torch.tensor([[0, 1], [1, 0]], device=device), 2)
    x, out = torch.randn(2, 128, device=device).half(), torch.empty(4, 64, device=device).half()
    decode_multiply(packed, x, groups, None, DecodePlan(1, 1, 1, 1, 2), 8, out)
    assert relative_error(in_pairs(out, groups), expected_product(x, groups, weights, None)) < TOLERANCE


def needs_hopper(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs a Hopper GPU")
