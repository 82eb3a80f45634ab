"""FP8 products and FP8 quantization of activations against float64, on a Hopper GPU or emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda.float8.quantize import Granularity, quantize_tokens
from aphroquant.kernels.cuda.float8.wgmma import Float8Tile, float8_multiply

TOLERANCE = 3e-3  # relative, in the norm: bf16 outputs, and the tensor cores' short sums


def codes(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns).to(torch.float8_e4m3fn).to(device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


def test_scales_of_rows_and_tokens(device: torch.device) -> None:
    weight, x = codes(72, 144, device), codes(19, 144, device)
    rows, tokens, bias = (torch.rand(size, device=device) + 0.5 for size in (72, 19, 72))
    tile = Float8Tile(16, warpgroups=1, stages=2)
    out = float8_multiply(weight, rows, x, tokens, tile, torch.bfloat16, bias=bias)
    scaled = (x.cpu().double() * tokens.cpu().double()[:, None], weight.cpu().double() * rows.cpu().double()[:, None])
    assert relative_error(out, scaled[0] @ scaled[1].T + bias.cpu().double()) < TOLERANCE


def test_scales_of_blocks(device: torch.device) -> None:
    weight, x = codes(200, 256, device), codes(5, 256, device)
    blocks, groups = torch.rand(2, 2, device=device) + 0.5, torch.rand(2, 16, device=device) + 0.5
    out = float8_multiply(
        weight, blocks, x, groups, Float8Tile(16, warpgroups=1, stages=2), torch.float16, block_rows=128
    )
    left = x.cpu().double() * groups.cpu().double().T[:5].repeat_interleave(128, 1)
    right = weight.cpu().double() * blocks.cpu().double().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)
    assert relative_error(out, left @ right.T) < TOLERANCE


def test_one_warpgroup_stores_while_the_other_multiplies(device: torch.device) -> None:
    weight, x = codes(264, 400, device), codes(35, 400, device)
    one = torch.ones(1, device=device)
    tile = Float8Tile(16, stages=3, persistent=True, lead=2)
    out = float8_multiply(weight, one, x, one, tile, torch.bfloat16, multiprocessors=2)
    assert relative_error(out, x.cpu().double() @ weight.cpu().double().T) < TOLERANCE


@pytest.mark.parametrize("columns", [64, 301])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_activations_are_rounded_to_the_nearest_code(
    granularity: Granularity, columns: int, device: torch.device
) -> None:
    x = (torch.randn(3, columns) * 4).to(torch.bfloat16)
    x[1] = 0
    given = torch.tensor([0.02], device=device)
    found = quantize_tokens(x.to(device), granularity, scale=given, padded_tokens=16)
    width = 128 if granularity is Granularity.GROUP else columns
    padded = torch.nn.functional.pad(x.float(), (0, -columns % width)).view(3, -1, width)
    scale = torch.full((3, 1, 1), 0.02)
    if granularity is not Granularity.GIVEN:
        scale = padded.abs().amax(-1, keepdim=True) / 448
        scale = torch.where(scale == 0, 1.0, scale)
        scales = found.scales.cpu()
        assert torch.equal(scales[:, :3].T if granularity is Granularity.GROUP else scales[:, None], scale[..., 0])
    expected = (padded / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)[:, :columns]
    assert torch.equal(found.codes.cpu().view(torch.uint8)[:, :columns], expected)
    assert found.codes.shape[1] % 16 == 0 and not found.codes.cpu().view(torch.uint8)[:, columns:].any()
