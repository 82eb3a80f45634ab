"""Grids of lookup schemes: a table under a scale for each block (NF4, FP4, NVFP4, MXFP4), and the search for scales.

Plain scales are those of the formats' own libraries: a block's largest magnitude becomes the table's largest entry, or
with powers of two nearly so. Searched ones are the best of several candidates by the error weighted with E[x**2]:

    NF4, FP4      shrunken and slightly stretched ranges; of NF4, whose table is uneven, with either sign; then twice
                  the least-squares scale for the codes at hand, since floats can hold it
    NVFP4         the e4m3 numbers around the one that makes the largest magnitude a 6, from 8.5 to 3.6: "four over
                  six" and all between, under a power of two as the global scale
    MXFP4         the exponent that just holds the largest magnitude, and its neighbours

Codes are chosen by what a reader decodes, after any rounding of the scales themselves. Squared errors relative to the
weight's in q_proj of block 7 and down_proj of block 12 of SmolLM2-135M, weighted by inputs of very different sizes:

                                             q_proj                   down_proj
    NF4     plain, searched (one sign)       .00943 .00606 (.00673)   .00928 .00573 (.00635)
    FP4     plain, searched                  .01810 .01260            .01777 .01200
    NVFP4   plain, four over six, searched   .00868 .00643 .00439     .00875 .00649 .00449
    MXFP4   plain, searched                  .01417 .01356            .01361 .01303

Global scales of NVFP4 between two powers of two changed the fourth digit of these. Mean KL divergences of the model
with its norms folded in, on 4 x 1024 tokens of Wikipedia (standard errors about 5 %): NVFP4 plain 0.275, searched
without data 0.257, with data, AWQ's scaling and error feedback 0.108; NF4 0.379, 0.326 and 0.134.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration import lookup_scales
from aphroquant.calibration.lookup_blocks import join_blocks, split_blocks
from aphroquant.errors import InputError
from aphroquant.schemes import LookupScheme, QuantizedWeight
from aphroquant.schemes.tables import Table, table_of

_CHUNK_ELEMENTS = 1 << 17  # of a search: its temporaries then stay in the processor's cache
_GPU_CHUNK_ELEMENTS = 1 << 25
_FLOAT_SHARES = tuple(1.03 - 0.05 * step for step in range(9))  # of the largest magnitude: 1.03 .. 0.63
_E4M3_STEPS = range(-4, 7)  # from the number that makes the largest magnitude a 6; an octave has eight
_E8M0_STEPS = (0, -1, 1)


class LookupPoints(NamedTuple):
    """The points of a weight, the scale of its block spread to every element, float32 [N, K]."""

    parameters: tuple[Tensor, ...]
    table: Table

    def round(self, values: Tensor, parameters: Sequence[Tensor], codes: Tensor, errors: Tensor) -> None:
        (scale,) = parameters
        place = torch.bucketize(torch.div(values, scale, out=errors), self.table.boundaries)
        codes.copy_(self.table.codes[place])
        torch.mul(self.table.values[place], scale, out=errors).neg_().add_(values)


@dataclass(frozen=True)
class LookupGrid:
    """A `WeightGrid`. `stored` are the scheme's tensors but for the codes. `chosen_by` float32 [B] are the scales of
    blocks that codes are chosen by: those that a reader decodes, unless another library's choice is repeated."""

    scheme: LookupScheme
    shape: tuple[int, int]
    stored: Mapping[str, Tensor]
    chosen_by: Tensor

    def nearest(self, weight: Tensor) -> Tensor:
        blocks, scales = split_blocks(weight, self.scheme), _nonzero(self.chosen_by)[:, None]
        # bitsandbytes multiplies by the reciprocal and compressed-tensors divides, which decides where a number lies
        # in the middle between two entries.
        relative = blocks * (1 / scales) if self.scheme.flattened else blocks / scales
        table = table_of(self.scheme.table, weight.device)
        codes = table.codes[table.places(relative)]
        return join_blocks(codes, self.scheme, self.shape).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return self.quantized(codes).dequantize()

    def points(self) -> LookupPoints:
        scales = _nonzero(self.scheme.block_scales(self.stored)).reshape(-1, 1)
        spread = join_blocks(scales.expand(-1, self.scheme.block_size), self.scheme, self.shape)
        return LookupPoints((spread,), table_of(self.scheme.table, spread.device))

    def quantized(self, codes: Tensor) -> QuantizedWeight:
        return QuantizedWeight(self.scheme, {"codes": codes.contiguous(), **self.stored}, self.shape)


def plain_grids(weights: Sequence[Tensor], scheme: LookupScheme, magnitude: Tensor | None = None) -> list[LookupGrid]:
    """The scales that other libraries choose. `magnitude` [] is that of all rows, if the weights are only some."""
    largest = [_largest(weight, scheme) for weight in weights]
    common = lookup_scales.plain_global(_greatest(largest, magnitude))
    return [_plain(weight, own, scheme, common) for weight, own in zip(weights, largest, strict=True)]


def searched_grids(
    weights: Sequence[Tensor], importance: Tensor, scheme: LookupScheme, magnitude: Tensor | None = None
) -> list[LookupGrid]:
    """The best scales of the candidates; importance [K] is what an error in a column costs."""
    largest = [_largest(weight, scheme) for weight in weights]
    common = lookup_scales.roomy_global(_greatest(largest, magnitude))
    return [_searched(weight, own, importance, scheme, common) for weight, own in zip(weights, largest, strict=True)]


def _plain(weight: Tensor, largest: Tensor, scheme: LookupScheme, common: Tensor) -> LookupGrid:
    shape = (weight.shape[0], weight.shape[1])
    if scheme.scales == "e8m0":
        return _with_bytes(scheme, shape, lookup_scales.plain_exponents(largest), common)
    if scheme.scales == "e4m3":
        codes = lookup_scales.e4m3_codes(largest / table_of(scheme.table, weight.device).top, common)
        return _with_bytes(scheme, shape, codes, common)
    if scheme.scales == "float":
        return LookupGrid(scheme, shape, {"scales": largest}, largest)
    return LookupGrid(scheme, shape, lookup_scales.nest(largest), largest)


def _searched(weight: Tensor, largest: Tensor, importance: Tensor, scheme: LookupScheme, common: Tensor) -> LookupGrid:
    shape, table = (weight.shape[0], weight.shape[1]), table_of(scheme.table, weight.device)
    blocks = split_blocks(weight, scheme)
    weights = split_blocks(importance.float().expand(shape) if scheme.flattened else importance[None], scheme)
    if scheme.scales in ("e4m3", "e8m0"):
        return _with_bytes(scheme, shape, _best_bytes(blocks, weights, largest, scheme, common, table), common)
    scales = _best_floats(blocks, weights, largest, table, signed=scheme.scales == "float" and not table.is_even)
    if scheme.scales == "float":
        return LookupGrid(scheme, shape, {"scales": scales}, scales)
    stored = lookup_scales.nest(scales)
    return LookupGrid(scheme, shape, stored, scheme.block_scales(stored))


def _with_bytes(scheme: LookupScheme, shape: tuple[int, int], codes: Tensor, common: Tensor) -> LookupGrid:
    """With scales of one byte each, [B]."""
    dtype = torch.float8_e4m3fn if scheme.scales == "e4m3" else torch.float8_e8m0fnu
    stored = {"scales": codes.view(shape[0], -1).view(dtype)}
    if scheme.scales == "e4m3":
        stored["global_scale"] = common
    return LookupGrid(scheme, shape, stored, scheme.block_scales(stored).flatten())


def _best_bytes(
    blocks: Tensor, weights: Tensor, largest: Tensor, scheme: LookupScheme, common: Tensor, table: Table
) -> Tensor:
    """The best scales of one byte, uint8 [B]."""
    steps: Sequence[int]
    if scheme.scales == "e4m3":
        start = lookup_scales.e4m3_codes(largest / table.top, common)
        steps, limits = _E4M3_STEPS, lookup_scales.E4M3_BYTES
    else:
        start, steps, limits = lookup_scales.plain_exponents(largest), _E8M0_STEPS, lookup_scales.E8M0_BYTES
    best = torch.empty_like(start)
    for part, own in _chunks(blocks, weights):
        candidates = [(start[part].int() + step).clamp(*limits).to(torch.uint8) for step in steps]
        decoded = (lookup_scales.decoded_bytes(codes, scheme, common) for codes in candidates)
        chosen = _least_error(blocks[part], own, decoded, table)
        best[part] = torch.stack(candidates).gather(0, chosen[None])[0]
    return best


def _best_floats(blocks: Tensor, weights: Tensor, largest: Tensor, table: Table, *, signed: bool) -> Tensor:
    """The best float32 scales [B]; with `signed`, negative ones among them."""
    best = torch.empty_like(largest)
    signs = (1.0, -1.0) if signed else (1.0,)
    for part, own in _chunks(blocks, weights):
        candidates = [largest[part] / table.top * share * sign for share in _FLOAT_SHARES for sign in signs]
        chosen = _least_error(blocks[part], own, candidates, table)
        scales = torch.stack(candidates).gather(0, chosen[None])[0]
        best[part] = _refitted(blocks[part], own, scales, table)
    return best


def _refitted(blocks: Tensor, weights: Tensor, scales: Tensor, table: Table) -> Tensor:
    """Least-squares scales for the codes that scales [B] give, kept where the new codes err less."""
    for _ in range(2):
        values = _nearest_values(blocks, scales, table)
        weighted = values * weights
        fitted = (weighted * blocks).sum(1) / (weighted * values).sum(1)
        fitted = torch.where(fitted.isfinite() & (fitted != 0), fitted, scales)
        better = _least_error(blocks, weights, (scales, fitted), table) == 1
        scales = torch.where(better, fitted, scales)
    return scales


def _least_error(blocks: Tensor, weights: Tensor, candidates: Iterable[Tensor], table: Table) -> Tensor:
    """Which of the candidate scales [B] errs least, int64 [B]; the first of equals."""
    least = torch.full((blocks.shape[0],), torch.inf, device=blocks.device)
    chosen = torch.zeros(blocks.shape[0], dtype=torch.int64, device=blocks.device)
    for number, scales in enumerate(candidates):
        values = _nearest_values(blocks, scales, table)
        error = values.mul_(scales[:, None]).sub_(blocks).square_().mul_(weights).sum(1)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, number, chosen)
    return chosen


def _nearest_values(blocks: Tensor, scales: Tensor, table: Table) -> Tensor:
    return table.nearest(blocks / _nonzero(scales)[:, None])


def _chunks(blocks: Tensor, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of blocks and their weights, which repeat from row to row unless there are as many as blocks."""
    elements = _CHUNK_ELEMENTS if blocks.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    repeats = weights.shape[0] != blocks.shape[0]
    unit = weights.shape[0] if repeats else 1
    step = max(1, elements // blocks.shape[1] // unit) * unit
    for start in range(0, blocks.shape[0], step):
        part = slice(start, min(start + step, blocks.shape[0]))
        yield part, weights.repeat((part.stop - start) // unit, 1) if repeats else weights[part]


def _largest(weight: Tensor, scheme: LookupScheme) -> Tensor:
    """The largest magnitude of each block, float32 [B]. InputError if one is not finite."""
    largest = split_blocks(weight, scheme).abs().amax(1)
    if not torch.isfinite(largest).all():
        raise InputError("a weight is not finite and cannot be quantized")
    return largest


def _greatest(largest: Sequence[Tensor], magnitude: Tensor | None) -> Tensor:
    if magnitude is not None:
        return magnitude
    return torch.cat([largest[0].new_zeros(1), *largest]).amax()


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)
