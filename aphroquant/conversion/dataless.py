"""Rounding without calibration data: each row stands for itself, so a matrix is solved in pieces of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from aphroquant.calibration.fp8 import quantize_fp8
from aphroquant.calibration.solution import Solution, relative_error
from aphroquant.calibration.solvers import FP8_ROUNDING
from aphroquant.conversion.plan import ConversionPlan
from aphroquant.errors import InputError
from aphroquant.schemes import FloatScheme, QuantizedWeight

PIECE_ELEMENTS = 2**22  # few enough for the processor's caches, enough for its threads


def solve_in_pieces(plan: ConversionPlan, module: str) -> Solution:
    """The solution of one module. InputError naming it if a weight is not finite."""
    if isinstance(plan.scheme, FloatScheme) and plan.scheme.granularity == "tensor":
        return _joined(list(_per_tensor(plan, plan.scheme, module)))
    rounding = FP8_ROUNDING() if isinstance(plan.scheme, FloatScheme) else plan.solver.load()
    solved = []
    for weight in _pieces(plan, module):
        with naming_modules(module):
            solution = rounding([weight], None, plan.scheme, plan.scale_dtype)[0]
        solved.append((solution, _square_sum(weight)))
    return _joined(solved)


@contextmanager
def naming_modules(modules: str) -> Iterator[None]:
    """Puts the modules before the message of an InputError from code that knows only numbers."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{modules}: {error.message}", hint=error.hint) from error


def _per_tensor(plan: ConversionPlan, scheme: FloatScheme, module: str) -> Iterator[tuple[Solution, float]]:
    """One scale for all pieces, so that they are gone through twice."""
    magnitude = torch.stack([weight.abs().amax() for weight in _pieces(plan, module)]).amax()
    for weight in _pieces(plan, module):
        rounded = quantize_fp8(weight, scheme, magnitude)
        error = relative_error(weight, rounded.dequantize(), None)
        yield Solution(rounded, error, {"rounding": "nearest"}), _square_sum(weight)


def _pieces(plan: ConversionPlan, module: str) -> Iterator[Tensor]:
    """Rows of the dense weight, float32: whole rows of blocks at a time."""
    columns = plan.modules[module][1]
    step = plan.scheme.block_shape[0] if isinstance(plan.scheme, FloatScheme) and plan.scheme.block_shape else 1
    rows = max(1, PIECE_ELEMENTS // max(columns, 1) // step) * step
    left = torch.empty(0, columns)
    for piece in plan.checkpoint.weight_pieces(module, rows * columns):
        weight = piece.dequantize()
        if not torch.isfinite(weight).all():
            raise InputError(f"{module}.weight holds NaN or infinite values and cannot be quantized")
        left = torch.cat([left, weight]) if left.numel() else weight
        whole = left.shape[0] // step * step  # a quantized source may be cut elsewhere
        if whole:
            yield left[:whole]
        left = left[whole:]
    if left.numel():
        yield left


def _joined(solved: list[tuple[Solution, float]]) -> Solution:
    """One solution of the pieces; the error of the whole weighs theirs by how large they are."""
    first = solved[0][0]
    if len(solved) == 1:
        return first
    pieces = [solution.weight for solution, _ in solved]
    rows = sum(piece.shape[0] for piece in pieces)
    shape = rows, pieces[0].shape[1]
    wanted = first.weight.scheme.shapes(*shape)
    tensors = {
        name: tensor if tensor.shape == wanted.get(name) else torch.cat([piece[name] for piece in pieces])
        for name, tensor in first.weight.tensors.items()
    }
    total = math.fsum(size for _, size in solved)
    error = math.fsum(solution.relative_error * size for solution, size in solved) / total if total else 0.0
    return Solution(QuantizedWeight(first.weight.scheme, tensors, shape), error, first.details, first.warnings)


def _square_sum(weight: Tensor) -> float:
    return float(weight.square().sum(dtype=torch.float64))
