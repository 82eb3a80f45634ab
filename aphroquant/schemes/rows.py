"""A quantized weight as pieces of consecutive rows: what is too large to be dequantized at once is, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator

from aphroquant.schemes.additive import AdditiveScheme
from aphroquant.schemes.affine import AffineScheme
from aphroquant.schemes.dense import DenseScheme
from aphroquant.schemes.float8 import FloatScheme
from aphroquant.schemes.integer import IntegerScheme
from aphroquant.schemes.kquant import KQuantScheme
from aphroquant.schemes.lookup import NESTED_BLOCK_SIZE, LookupScheme
from aphroquant.schemes.weight import QuantizedWeight, Scheme

# That AWQ packs in a word, and GPTQ of zero points: who looks for packing mistakes needs them together.
_PACKED_ROWS = 8


def rows_per_piece(columns: int, max_elements: int, step: int = 1) -> int:
    """How many rows have at most that many elements: a multiple of `step`, and at least one `step`."""
    return max(1, max_elements // max(columns, 1) // step) * step


def split_rows(weight: QuantizedWeight, max_elements: int) -> Iterator[QuantizedWeight]:
    """The weight in order, as views of its tensors. Whole, if its rows do not stand for themselves (EXL3, HQQ's
    axis 0)."""
    rows, columns = weight.shape
    step = row_step(weight.scheme, columns)
    if step is None or rows * columns <= max_elements:
        yield weight
        return
    size = rows_per_piece(columns, max_elements, step)
    for start in range(0, rows, size):
        yield _cut(weight, start, min(rows, start + size), step)


def split_rows_alike(
    first: QuantizedWeight, second: QuantizedWeight, max_elements: int
) -> Iterator[tuple[QuantizedWeight, QuantizedWeight]]:
    """Two weights of one shape in the same pieces, whatever their schemes are."""
    rows, columns = first.shape
    steps = [row_step(weight.scheme, columns) for weight in (first, second)]
    if None in steps or rows * columns <= max_elements:
        yield first, second
        return
    step = math.lcm(*(each for each in steps if each is not None))
    size = rows_per_piece(columns, max_elements, step)
    for start in range(0, rows, size):
        stop = min(rows, start + size)
        yield _cut(first, start, stop, step), _cut(second, start, stop, step)


def row_step(scheme: Scheme, columns: int) -> int | None:
    """A piece can begin at any multiple of this row; None if there can be no pieces."""
    if isinstance(scheme, IntegerScheme):
        return _PACKED_ROWS
    if isinstance(scheme, KQuantScheme | DenseScheme):
        return 1
    if isinstance(scheme, FloatScheme):
        return scheme.block_shape[0] if scheme.block_shape else 1
    if isinstance(scheme, AdditiveScheme):
        return scheme.out_group
    if isinstance(scheme, LookupScheme):
        blocks = NESTED_BLOCK_SIZE if scheme.scales == "nested" else 1
        return _whole_blocks(scheme.block_size * blocks, columns) if scheme.flattened else 1
    if isinstance(scheme, AffineScheme) and scheme.axis == 1:
        return _whole_blocks(scheme.group_size or columns, columns)
    return None


def _whole_blocks(block_size: int, columns: int) -> int | None:
    """The fewest rows that are a whole number of blocks of the flattened weight."""
    return math.lcm(block_size, columns) // columns if block_size and columns else None


def _cut(weight: QuantizedWeight, start: int, stop: int, step: int) -> QuantizedWeight:
    """The rows from `start` to `stop`. A tensor whose shape does not depend on the number of rows belongs to all."""
    columns = weight.shape[1]
    one, two, before, until = (weight.scheme.shapes(rows, columns) for rows in (step, 2 * step, start, stop))
    tensors = {
        name: tensor[before[name][0] : until[name][0]] if name in one and one[name] != two[name] else tensor
        for name, tensor in weight.tensors.items()
    }
    return QuantizedWeight(weight.scheme, tensors, (stop - start, columns))
