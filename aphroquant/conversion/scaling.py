"""AWQ and SmoothQuant on a block: channel scales searched on a sample of tokens and folded into what comes before.

    input_layernorm          -> q_proj, k_proj, v_proj      judged by the attention's output
    v_proj (rows)            -> o_proj (columns)            judged by o_proj's; query heads that share a value head
                                                            share its scales
    post_attention_layernorm -> gate_proj, up_proj          judged by the MLP's output
    up_proj (rows)           -> down_proj (columns)         judged by down_proj's

Where a scheme rounds inputs, so does the judge. A fold needs every layer concerned to be quantized, to integers or by a
table: what stays dense is carried over byte for byte, and FP8 weights that share one scale lose by rows of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aphroquant.calibration import awq, smoothquant
from aphroquant.calibration.awq import ChannelScales, Loss, search_scales
from aphroquant.calibration.gram import gram
from aphroquant.calibration.grids import plain_grids
from aphroquant.calibration.inputs import rounded_inputs
from aphroquant.calibration.solution import quadratic_form
from aphroquant.calibration.solvers import ChannelScaling
from aphroquant.conversion.calibration_block import CalibrationBlock
from aphroquant.conversion.dataless import naming_modules
from aphroquant.errors import InputError
from aphroquant.kernels.reference.matmul import linear as product
from aphroquant.models.spec import DOWN, GATE, INPUT_NORM, POST_ATTENTION_NORM, UP, K, O, Q, V
from aphroquant.schemes import IntegerScheme, LookupScheme

SAMPLE_TOKENS = 1024  # 2048 and 4096 gave the same divergence within its standard error


class BlockScaler:
    """Scales the channels of blocks. `schemes` are those of the modules whose channels may be scaled, `scaled` says how
    for those whose solver wants it, and `stored_dtype` tells the dtype that a tensor is stored in."""

    def __init__(
        self,
        schemes: Mapping[str, IntegerScheme | LookupScheme],
        scaled: Mapping[str, ChannelScaling],
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
        inputs = self._search(block, names, x, self._output_loss(block, names, x, block.attention))
        if inputs is not None:
            report["qkv"] = _summary(inputs)
        tie = _tie_query_heads(block)
        scales = self._search(block, (O,), mixed, self._linear_loss(block, O, mixed), producer=V, tie=tie)
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
        inputs = self._search(block, names, x, self._output_loss(block, names, x, block.block.mlp))
        if inputs is not None:
            report["gate_up"] = _summary(inputs)
        scales = self._search(block, (DOWN,), inner, self._linear_loss(block, DOWN, inner), producer=UP)
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
        loss: Loss,
        producer: str | None = None,
        tie: Callable[[Tensor], Tensor] = lambda channels: channels,
    ) -> ChannelScales | None:
        """None if these, or the layer that would take the scales, must stay as they are, or none is to be scaled."""
        modules = [f"{block.prefix}.{name}" for name in names]
        scaling = next((self._scaled[module] for module in modules if module in self._scaled), None)
        if scaling is None or not self._all_scalable(block, names if producer is None else (*names, producer)):
            return None
        if not torch.isfinite(x).all():
            raise InputError(f"{block.prefix}.{names[0]}: its input is not finite for some calibration tokens")
        weights = [block.linears[name].weight for name in names]
        schemes = [self._schemes[module] for module in modules]
        roundings = [partial(_round, scheme=scheme) for scheme in schemes]
        magnitudes = x.abs()
        if scaling == "awq":
            size = schemes[0].group_size if isinstance(schemes[0], IntegerScheme) else schemes[0].block_size
            candidate = awq.candidates(weights, magnitudes.mean(0), group_size=size, tie=tie)
        else:
            candidate = smoothquant.candidates(weights, magnitudes.amax(0), tie=tie)
        with naming_modules(", ".join(modules)):
            return search_scales(weights, candidate, loss, roundings)

    def _output_loss(
        self, block: CalibrationBlock, names: Sequence[str], x: Tensor, forward: Callable[[Tensor], Tensor]
    ) -> Loss:
        """Mean squared change of the attention's or the MLP's output when `names` get other weights."""
        expected, inputs = forward(x), self._inputs(block, names)
        is_attention = names[0] == Q

        def loss(weights: Sequence[Tensor], scales: Tensor) -> float:
            other, seen = block.replaced(dict(zip(names, weights, strict=True))), _seen(x, scales, inputs)
            output = other.attention(seen) if is_attention else other.block.mlp(seen)
            return float((output - expected).square().mean())

        return loss

    def _linear_loss(self, block: CalibrationBlock, name: str, x: Tensor) -> Loss:
        """Mean squared change of one linear's output."""
        weight, inputs = block.linears[name].weight, self._inputs(block, (name,))
        if inputs is not None:
            expected = product(x, weight)

            def loss(weights: Sequence[Tensor], scales: Tensor) -> float:
                return float((product(_seen(x, scales, inputs), weights[0]) - expected).square().mean())

            return loss
        moment = gram(x) / max(x.shape[0], 1)
        return lambda weights, scales: float(quadratic_form(weights[0] - weight, moment).mean())

    def _inputs(self, block: CalibrationBlock, names: Sequence[str]) -> IntegerScheme | LookupScheme | None:
        """The scheme that says how the layers' common input is rounded, if it is."""
        scheme = self._schemes.get(f"{block.prefix}.{names[0]}")
        return None if scheme is None or scheme.activations is None else scheme

    def _all_scalable(self, block: CalibrationBlock, names: Sequence[str]) -> bool:
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
        block.divided_rows[producer] = rows
        if made.bias is not None:
            name = f"{block.prefix}.{producer}.bias"
            block.changed[name] = (made.bias / rows).to(self._stored_dtype(name))
            made.bias = block.changed[name].float()


def _round(weight: Tensor, scheme: IntegerScheme | LookupScheme) -> Tensor:
    (grid,) = plain_grids([weight], scheme, torch.float16)
    return grid.decode(grid.nearest(weight))


def _seen(x: Tensor, scales: Tensor, inputs: IntegerScheme | LookupScheme | None) -> Tensor:
    """The input x as layers see it that round it after a division by scales."""
    return x if inputs is None else rounded_inputs(x / scales, inputs) * scales


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
