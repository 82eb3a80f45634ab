"""Folding channel scales preserves the block's function, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.calibration.inputs import rounded_inputs
from aphroquant.calibration.solvers import ChannelScaling
from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.conversion.calibration_block import CalibrationBlock, load_calibration_block
from aphroquant.conversion.scaling import BlockScaler
from aphroquant.models.spec import DOWN, GATE, INPUT_NORM, LINEARS, POST_ATTENTION_NORM, K, O, Q, V
from aphroquant.schemes import ActivationScheme, IntegerScheme, LookupScheme

SCHEME = IntegerScheme(3, 16, False)
INT8_INPUTS = IntegerScheme(8, None, True, activations=ActivationScheme("int"))
STATIC_INPUTS = IntegerScheme(8, None, True, activations=ActivationScheme("int", dynamic=False, granularity="tensor"))
NVFP4_INPUTS = LookupScheme(
    "e2m1", 16, "e4m3", activations=ActivationScheme("float", 4, granularity="group", group_size=16)
)
NF4 = LookupScheme("nf4", 64, "float", flattened=True)
WINDOW = 16
FAMILIES = [
    ("llama", {}),
    ("llama", {"mlp_bias": True, "attention_bias": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
]


def opened(tiny_checkpoint: Callable[..., Path], family: str, overrides: dict[str, bool]) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(family, **overrides))


def forward(block: CalibrationBlock, hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden + block.attention(block.block.norm(INPUT_NORM, hidden))
    return hidden + block.block.mlp(block.block.norm(POST_ATTENTION_NORM, hidden))


def scale(
    block: CalibrationBlock,
    checkpoint: Checkpoint,
    hidden: torch.Tensor,
    kept: tuple[str, ...] = (),
    scheme: IntegerScheme | LookupScheme = SCHEME,
    way: ChannelScaling = "awq",
) -> None:
    schemes = {module: scheme for module in checkpoint.spec.modules() if not (kept and module.endswith(kept))}
    scaler = BlockScaler(schemes, dict.fromkeys(schemes, way), lambda name: checkpoint.tensors[name].dtype)
    scaler.scale_attention(block, block.block.norm(INPUT_NORM, hidden))
    after = hidden + block.attention(block.block.norm(INPUT_NORM, hidden))
    scaler.scale_mlp(block, block.block.norm(POST_ATTENTION_NORM, after))


@pytest.mark.parametrize(("family", "overrides"), FAMILIES, ids=str)
def test_the_block_computes_the_same_function(
    tiny_checkpoint: Callable[..., Path], family: str, overrides: dict[str, bool]
) -> None:
    checkpoint = opened(tiny_checkpoint, family, overrides)
    hidden = torch.randn(4 * WINDOW, 64) * torch.logspace(-1, 1, 64)
    block = load_calibration_block(checkpoint, 1, WINDOW)
    before = forward(block, hidden)
    original = {name: block.linears[name].weight.clone() for name in LINEARS}
    scale(block, checkpoint, hidden)
    changed = [name for name in LINEARS if not torch.equal(block.linears[name].weight, original[name])]
    assert len(changed) >= 3, changed  # scaling may be best left alone here and there
    worst = float((forward(block, hidden) - before).abs().max() / before.abs().max())
    assert worst < 1e-5, worst


@pytest.mark.parametrize("way", ["awq", "smoothquant"])
@pytest.mark.parametrize("scheme", [INT8_INPUTS, STATIC_INPUTS, NVFP4_INPUTS, NF4], ids=str)
def test_the_block_computes_the_same_function_whatever_the_scheme(
    tiny_checkpoint: Callable[..., Path], scheme: IntegerScheme | LookupScheme, way: ChannelScaling
) -> None:
    checkpoint = opened(tiny_checkpoint, "llama", {})
    hidden = torch.randn(4 * WINDOW, 64) * torch.logspace(-1, 1, 64)
    block = load_calibration_block(checkpoint, 1, WINDOW)
    before = forward(block, hidden)
    scale(block, checkpoint, hidden, scheme=scheme, way=way)
    assert block.changed
    worst = float((forward(block, hidden) - before).abs().max() / before.abs().max())
    assert worst < 1e-5, worst


def test_smoothquant_takes_magnitude_out_of_the_largest_channels(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = opened(tiny_checkpoint, "llama", {})
    block = load_calibration_block(checkpoint, 0, WINDOW)
    block.norms[INPUT_NORM][5] *= 100
    hidden = torch.randn(4 * WINDOW, 64)
    before = rounded_inputs(block.block.norm(INPUT_NORM, hidden), INT8_INPUTS)
    scale(block, checkpoint, hidden, scheme=INT8_INPUTS, way="smoothquant")
    after = block.block.norm(INPUT_NORM, hidden)
    others = [channel for channel in range(64) if channel != 5]
    spread = [float(x[:, 5].abs().max() / x[:, others].abs().max()) for x in (before, after)]
    assert spread[1] < 0.2 * spread[0]


def test_the_source_is_not_modified(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = opened(tiny_checkpoint, "llama", {})
    block = load_calibration_block(checkpoint, 0, WINDOW)
    originals = {name: (block.linears[name].weight, block.linears[name].weight.clone()) for name in LINEARS}
    scale(block, checkpoint, torch.randn(2 * WINDOW, 64))
    for weight, copy in originals.values():
        assert torch.equal(weight, copy)


def test_bfloat16_norms_are_rounded_once_and_the_columns_make_up_for_it(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama", torch_dtype="bfloat16"))
    hidden = torch.randn(4 * WINDOW, 64) * torch.logspace(-1, 1, 64)
    block = load_calibration_block(checkpoint, 0, WINDOW)
    before = forward(block, hidden)
    scale(block, checkpoint, hidden)
    gain = block.changed[f"{block.prefix}.{INPUT_NORM}.weight"]
    assert gain.dtype == torch.bfloat16
    assert torch.equal(gain.float(), block.norms[INPUT_NORM])
    assert float((forward(block, hidden) - before).abs().max() / before.abs().max()) < 1e-5


def test_query_heads_of_a_group_share_the_scales_of_their_value_head(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = opened(tiny_checkpoint, "llama", {})
    block = load_calibration_block(checkpoint, 0, WINDOW)
    before_o, before_v = block.linears[O].weight, block.linears[V].weight
    scale(block, checkpoint, torch.randn(4 * WINDOW, 64) * torch.logspace(-1, 1, 64), kept=(Q,))
    columns = (block.linears[O].weight / before_o).mean(0).view(2, 2, 16)  # [kv heads, query heads each, d]
    torch.testing.assert_close(columns[:, 0], columns[:, 1])
    rows = (before_v / block.linears[V].weight).mean(1).view(2, 16)
    torch.testing.assert_close(rows, columns[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [K, V, GATE, DOWN])
def test_layers_that_stay_dense_are_never_changed(tiny_checkpoint: Callable[..., Path], kept: str) -> None:
    checkpoint = opened(tiny_checkpoint, "llama", {})
    block = load_calibration_block(checkpoint, 0, WINDOW)
    hidden = torch.randn(2 * WINDOW, 64) * torch.logspace(-1, 1, 64)
    before, weight = forward(block, hidden), block.linears[kept].weight.clone()
    scale(block, checkpoint, hidden, kept=(kept,))
    assert torch.equal(block.linears[kept].weight, weight)
    assert float((forward(block, hidden) - before).abs().max() / before.abs().max()) < 1e-5
