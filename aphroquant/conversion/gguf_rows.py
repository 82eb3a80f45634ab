"""The rows of a GGUF file: read, encoded and looked at again in pieces, so that no matrix is whole in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.checkpoint import Checkpoint, EncodedRows, GgufWriter
from aphroquant.conversion.gguf_plan import GgufPlan, weight_only
from aphroquant.conversion.gguf_types import is_dense
from aphroquant.conversion.loss import LossError
from aphroquant.conversion.soundness import check_codes
from aphroquant.errors import AphroquantError, UsageError
from aphroquant.schemes import DenseScheme, QuantizedWeight
from aphroquant.schemes.rows import row_step, rows_per_piece

PIECE_ELEMENTS = 2**21  # few enough for the caches of the encoders, whose results for a piece stand side by side


class Piece(NamedTuple):
    """Rows of the tensor `name` from `start` on, as the source has them; the whole, if it is no matrix."""

    name: str
    start: int
    value: Tensor | QuantizedWeight

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


class Rows(NamedTuple):
    """A piece as it will be stored. `squares` are those of its errors, and of the weights that have them."""

    encoded: EncodedRows
    squares: tuple[float, float] = (0.0, 0.0)
    rescaled: bool = False


def pieces(checkpoint: Checkpoint, plan: GgufPlan) -> Iterator[tuple[Piece, int]]:
    """All planned tensors in order, and how many numbers each piece has."""
    for name in plan.tensors:
        module = name.removesuffix(".weight")
        if module not in plan.types:
            value = checkpoint.read(name)
            yield Piece(name, 0, value), value.numel()
            continue
        start = 0
        for weight in checkpoint.weight_pieces(module, _elements_at_once(checkpoint, plan, name)):
            yield Piece(name, start, weight), math.prod(weight.shape)
            start += weight.shape[0]


def encoded_rows(
    checkpoint: Checkpoint, plan: GgufPlan, writer: GgufWriter, importance: Mapping[str, Tensor], piece: Piece
) -> Rows:
    """The piece in the planned type: the source's own numbers, compared bit for bit, or encoded anew."""
    if not isinstance(piece.value, QuantizedWeight):
        return Rows(writer.encoded(piece.name, piece.value.float()))
    check_codes(checkpoint, piece.module, piece.value.tensors.values())
    if piece.module in plan.exact:
        return _repacked(plan, writer, piece, weight_only(piece.value))
    return _quantized(plan, writer, piece, piece.value, importance.get(piece.module))


def _repacked(plan: GgufPlan, writer: GgufWriter, piece: Piece, weight: QuantizedWeight) -> Rows:
    try:
        dense = plan.types[piece.module] == "F32"
        encoded = writer.encoded(piece.name, weight.dequantize() if dense else weight)
    except UsageError as error:
        raise LossError(error.message) from error
    stored = writer.decoded(piece.name, encoded)
    if not stored.same_values(weight):
        raise AphroquantError(f"{piece.module}: repacking changed its values; nothing was written")
    same = "global_scale" not in weight.tensors or torch.equal(stored["global_scale"], weight["global_scale"])
    return Rows(encoded, rescaled=not same and piece.start == 0)


def _quantized(
    plan: GgufPlan, writer: GgufWriter, piece: Piece, source: QuantizedWeight, importance: Tensor | None
) -> Rows:
    weight = source["weight"] if isinstance(source.scheme, DenseScheme) else source.dequantize()
    encoded = writer.encoded(piece.name, weight, importance=importance)
    if is_dense(plan.types[piece.module]):
        return Rows(encoded)
    error = writer.decoded(piece.name, encoded).dequantize().sub_(weight)
    squares = (_square_sum(error), _square_sum(weight.float()))
    return Rows(encoded, squares)


def _square_sum(numbers: Tensor) -> float:
    return float(numbers.square().sum(dtype=torch.float64))


def _elements_at_once(checkpoint: Checkpoint, plan: GgufPlan, name: str) -> int:
    """Of pieces that are whole heads, whose rows a GGUF file has in another order, and whatever the scheme asks for."""
    rows, columns = plan.tensors[name].shape
    step = row_step(checkpoint.schemes()[name.removesuffix(".weight")], columns)
    if step is None:
        return rows * columns
    head = checkpoint.spec.head_dim if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
    return rows_per_piece(columns, PIECE_ELEMENTS, math.lcm(step, head)) * columns
