"""AWQ on a block: channel scales searched on a sample of tokens and folded into what comes before.

    input_layernorm          -> q_proj, k_proj, v_proj      judged by the attention's output
    v_proj (rows)            -> o_proj (columns)            judged by o_proj's; query heads that share a value head
                                                            share its scales
    post_attention_layernorm -> gate_proj, up_proj          judged by the MLP's output
    up_proj (rows)           -> down_proj (columns)         judged by down_proj's

A fold needs every layer concerned to be quantized to integers: what stays dense is carried over byte for byte, and FP8
weights that share one scale lose by rows of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aphroquant.calibration.awq import ChannelScales, search_scales
from aphroquant.calibration.gram import gram
from aphroquant.calibration.integer_grid import dequantize, min_max_grid, quantize
from aphroquant.calibration.solution import quadratic_form
from aphroquant.conversion.calibration_block import CalibrationBlock
from aphroquant.errors import InputError
from aphroquant.models.spec import DOWN, GATE, INPUT_NORM, POST_ATTENTION_NORM, UP, K, O, Q, V
from aphroquant.schemes import IntegerScheme

SAMPLE_TOKENS = 1024  # 2048 and 4096 gave the same divergence within its standard error


class BlockScaler:
    """Scales the channels of blocks. `schemes` are those of the modules that are quantized to integers, `scaled` the
    ones of them whose solver wants it, and `stored_dtype` tells the dtype that a tensor is stored in."""

    def __init__(
        self,
        schemes: Mapping[str, IntegerScheme],
        scaled: Collection[str],
        stored_dtype: Callable[[str], torch.dtype],
    ) -> None:
        self._schemes = schemes
        self._scaled = scaled
        self._stored_dtype = stored_dtype

    def scale_attention(self, block: CalibrationBlock, x: Tensor) -> dict[str, Any]:
        """Scale q, k, v and o for the normed input x [T, H]; a report for each of the two searches."""
        report = {}
        mixed = block.attention_mix(x)
        names = (Q, K, V)
        inputs = self._search(block, names, x, _output_loss(block, names, x, block.attention))
        if inputs is not None:
            report["qkv"] = _summary(inputs)
        tie = _tie_query_heads(block)
        scales = self._search(block, (O,), mixed, _linear_loss(block, O, mixed), producer=V, tie=tie)
        if scales is not None:
            report["o"] = _summary(scales)
            self._fold_into_rows(block, V, O, scales.scales, _value_rows(block, scales.scales))
        if inputs is not None:
            self._fold_into_norm(block, INPUT_NORM, names, inputs.scales)
        return report

    def scale_mlp(self, block: CalibrationBlock, x: Tensor) -> dict[str, Any]:
        """Scale gate, up and down for the normed input x [T, H] of the MLP."""
        report = {}
        inner = block.mlp_inner(x)
        names = (GATE, UP)
        inputs = self._search(block, names, x, _output_loss(block, names, x, block.block.mlp))
        if inputs is not None:
            report["gate_up"] = _summary(inputs)
        scales = self._search(block, (DOWN,), inner, _linear_loss(block, DOWN, inner), producer=UP)
        if scales is not None:
            report["down"] = _summary(scales)
            self._fold_into_rows(block, UP, DOWN, scales.scales, scales.scales)
        if inputs is not None:
            self._fold_into_norm(block, POST_ATTENTION_NORM, names, inputs.scales)
        return report

    def _search(
        self,
        block: CalibrationBlock,
        names: Sequence[str],
        x: Tensor,
        loss: Callable[[Sequence[Tensor]], float],
        producer: str | None = None,
        tie: Callable[[Tensor], Tensor] = lambda channels: channels,
    ) -> ChannelScales | None:
        """None if these, or the layer that would take the scales, must stay as they are, or none is to be scaled."""
        modules = [f"{block.prefix}.{name}" for name in names]
        if not any(module in self._scaled for module in modules):
            return None
        if not self._all_integers(block, names if producer is None else (*names, producer)):
            return None
        if not torch.isfinite(x).all():
            raise InputError(f"{block.prefix}.{names[0]}: its input is not finite for some calibration tokens")
        weights = [block.linears[name].weight for name in names]
        schemes = [self._schemes[module] for module in modules]
        roundings = [partial(_round, scheme=scheme) for scheme in schemes]
        return search_scales(weights, x.abs().mean(0), loss, roundings, group_size=schemes[0].group_size, tie=tie)

    def _all_integers(self, block: CalibrationBlock, names: Sequence[str]) -> bool:
        return all(f"{block.prefix}.{name}" in self._schemes for name in names)

    def _fold_into_norm(self, block: CalibrationBlock, norm: str, names: Sequence[str], scales: Tensor) -> None:
        """Divide the gain and multiply the columns, by what the gain's stored dtype makes of the scales."""
        name = f"{block.prefix}.{norm}.weight"
        gain = block.norms[norm]
        dtype = self._stored_dtype(name)
        folded = (gain / scales).to(dtype)
        folded = torch.where(folded.isfinite() & (folded != 0), folded, gain.to(dtype))  # beyond what the dtype holds
        exact = torch.where(folded != 0, gain / folded.float(), torch.ones_like(gain))
        block.norms[norm] = folded.float()
        block.changed[name] = folded
        for linear in names:
            block.linears[linear].weight = block.linears[linear].weight * exact

    def _fold_into_rows(
        self, block: CalibrationBlock, producer: str, consumer: str, columns: Tensor, rows: Tensor
    ) -> None:
        """Divide the rows (and bias) of `producer` and multiply the columns of `consumer`."""
        made, used = block.linears[producer], block.linears[consumer]
        used.weight = used.weight * columns
        made.weight = made.weight / rows[:, None]
        if made.bias is not None:
            name = f"{block.prefix}.{producer}.bias"
            block.changed[name] = (made.bias / rows).to(self._stored_dtype(name))
            made.bias = block.changed[name].float()


def _round(weight: Tensor, scheme: IntegerScheme) -> Tensor:
    grid = min_max_grid(weight, scheme)
    return dequantize(quantize(weight, grid, scheme), grid, scheme)


def _output_loss(
    block: CalibrationBlock, names: Sequence[str], x: Tensor, forward: Callable[[Tensor], Tensor]
) -> Callable[[Sequence[Tensor]], float]:
    """Mean squared change of the attention's or the MLP's output when `names` get other weights."""
    expected = forward(x)
    is_attention = names[0] == Q

    def loss(weights: Sequence[Tensor]) -> float:
        other = block.replaced(dict(zip(names, weights, strict=True)))
        output = other.attention(x) if is_attention else other.block.mlp(x)
        return float((output - expected).square().mean())

    return loss


def _linear_loss(block: CalibrationBlock, name: str, x: Tensor) -> Callable[[Sequence[Tensor]], float]:
    """Mean squared change of one linear's output."""
    weight = block.linears[name].weight
    moment = gram(x) / max(x.shape[0], 1)
    return lambda weights: float(quadratic_form(weights[0] - weight, moment).mean())


def _tie_query_heads(block: CalibrationBlock) -> Callable[[Tensor], Tensor]:
    """Give the channels of all query heads that share a value head their mean."""
    spec = block.block.spec
    shared = spec.num_heads // spec.num_kv_heads

    def tie(channels: Tensor) -> Tensor:
        heads = channels.view(spec.num_kv_heads, shared, spec.head_dim)
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)

    return tie


def _value_rows(block: CalibrationBlock, scales: Tensor) -> Tensor:
    """Scales of o_proj's columns [heads * d] as scales of v_proj's rows [kv heads * d]."""
    spec = block.block.spec
    return scales.view(spec.num_kv_heads, -1, spec.head_dim)[:, 0].reshape(-1)


def _summary(scales: ChannelScales) -> dict[str, Any]:
    return {"ratio": scales.ratio, "loss": scales.loss, "unscaled_loss": scales.unscaled_loss}
