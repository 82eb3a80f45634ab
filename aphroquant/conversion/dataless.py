"""Rounding without calibration data: each row stands for itself, so a matrix is solved in pieces of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from aphroquant import buffers
from aphroquant.calibration import mse, rtn
from aphroquant.calibration.fp8 import round_fp8
from aphroquant.calibration.lookup_scales import nested
from aphroquant.calibration.solution import Solution
from aphroquant.calibration.solvers import rounding_for
from aphroquant.checkpoint.tensor_io import kept_in_cache
from aphroquant.conversion.ahead import in_order
from aphroquant.conversion.plan import ConversionPlan
from aphroquant.errors import InputError
from aphroquant.models.spec import GATE, UP, K, Q, V
from aphroquant.numbers import is_finite, largest_magnitude
from aphroquant.schemes import DenseScheme, FloatScheme, LookupScheme, QuantizedWeight, Scheme

PIECE_ELEMENTS = 2**22  # few enough for the processor's caches, enough for its threads


def solve_in_pieces(plan: ConversionPlan, module: str) -> Solution:
    """The solution of one module. InputError naming it if a weight is not finite, or its square is not in float32."""
    solution = _in_pieces(plan, plan.schemes[module], module)
    if not math.isfinite(solution.relative_error):
        raise InputError(f"{module}: its weights are too large: their squares do not fit into float32")
    return solution


def _in_pieces(plan: ConversionPlan, scheme: Scheme, module: str) -> Solution:
    if isinstance(scheme, FloatScheme) and scheme.granularity == "tensor":
        return joined(_per_tensor(plan, scheme, module), plan.modules[module])
    if isinstance(scheme, LookupScheme):
        return _into_table(plan, scheme, module)
    return joined(_rounded(plan, scheme, module), plan.modules[module])


def _rounded(plan: ConversionPlan, scheme: Scheme, module: str) -> Iterator[tuple[Solution, float]]:
    rounding = rounding_for(scheme, plan.solvers[module])

    def solve(weight: Tensor) -> Solution:
        with naming_modules(module):
            return rounding([weight], None, scheme, plan.scale_dtype)[0]

    return _solved(plan, module, solve)


def _solved(plan: ConversionPlan, module: str, solve: Callable[[Tensor], Solution]) -> Iterator[tuple[Solution, float]]:
    """Each piece in order, solved in threads while the next are read, and the squares of its weights."""

    def work(weight: Tensor) -> tuple[Solution, float]:
        solution = solve(weight)
        return solution, square_sum(solution, weight)

    sized = ((weight, weight.numel()) for weight in _pieces(plan, module))
    for _, solved in in_order(sized, work):
        yield solved


@contextmanager
def naming_modules(modules: str) -> Iterator[None]:
    """Puts the modules before the message of an InputError from code that knows only numbers."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{modules}: {error.message}", hint=error.hint) from error


def _into_table(plan: ConversionPlan, scheme: LookupScheme, module: str) -> Solution:
    """Scales that are quantized once more depend on all others, and are so when the others are known."""
    if scheme.scales == "e4m3":
        return joined(_under_common_scale(plan, scheme, module), plan.modules[module])
    if scheme.scales != "nested":
        return joined(_rounded(plan, scheme, module), plan.modules[module])
    found = joined(_rounded(plan, replace(scheme, scales="float"), module), plan.modules[module])
    return replace(found, weight=nested(found.weight))


def _under_common_scale(plan: ConversionPlan, scheme: LookupScheme, module: str) -> Iterator[tuple[Solution, float]]:
    """With the global scale that layers share which engines multiply as one."""
    fused = [name for name in _same_input(plan, module) if plan.schemes.get(name) == scheme]
    magnitude = torch.stack([largest_magnitude(weight) for name in fused for weight in _pieces(plan, name)]).amax()
    rounding = {"rtn": rtn.solve, "mse": mse.solve}[plan.solvers[module].name]
    return _solved(
        plan, module, lambda weight: rounding([weight], None, scheme, plan.scale_dtype, magnitude.float())[0]
    )


def _same_input(plan: ConversionPlan, module: str) -> tuple[str, ...]:
    """The module and those that engines join with it because they read the same: q, k and v, or gate and up."""
    spec = plan.spec
    for layer in range(spec.num_layers):
        groups = [(Q, K, V), (GATE, UP)]
        if spec.experts is not None:
            groups += [spec.experts.expert(number)[:2] for number in range(spec.experts.num_experts)]
        for group in groups:
            names = tuple(f"{spec.block_prefix(layer)}.{name}" for name in group)
            if module in names:
                return names
    return (module,)


def _per_tensor(plan: ConversionPlan, scheme: FloatScheme, module: str) -> Iterator[tuple[Solution, float]]:
    """One scale for all pieces, so that they are gone through twice."""
    with kept_in_cache():
        magnitude = torch.stack([largest_magnitude(weight) for weight in _pieces(plan, module)]).amax()
    return _solved(plan, module, lambda weight: round_fp8(weight, scheme, magnitude))


def _pieces(plan: ConversionPlan, module: str) -> Iterator[Tensor]:
    """Rows of the dense weight, in its own dtype (float32 of a quantized one): whole rows of blocks at a time."""
    columns, scheme = plan.modules[module][1], plan.schemes[module]
    step = _row_unit(scheme, columns)
    rows = max(1, PIECE_ELEMENTS // max(columns, 1) // step) * step
    left = torch.empty(0, columns)
    for piece in plan.checkpoint.weight_pieces(module, rows * columns):
        weight = piece["weight"] if isinstance(piece.scheme, DenseScheme) else piece.dequantize()
        if not is_finite(weight):
            raise InputError(f"{module}.weight holds NaN or infinite values and cannot be quantized")
        left = torch.cat([left, weight]) if left.numel() else weight
        whole = left.shape[0] // step * step  # a quantized source may be cut elsewhere
        if whole:
            yield left[:whole]
        left = left[whole:]
    if left.numel():
        yield left


def _row_unit(scheme: Scheme, columns: int) -> int:
    """Rows whose blocks are all whole."""
    if isinstance(scheme, FloatScheme) and scheme.block_shape is not None:
        return scheme.block_shape[0]
    if isinstance(scheme, LookupScheme) and scheme.flattened:
        return scheme.block_size // math.gcd(scheme.block_size, columns)
    return 1


def joined(solved: Iterator[tuple[Solution, float]], shape: tuple[int, int]) -> Solution:
    """One solution of the pieces; the error of the whole weighs theirs by how large they are.

    What they hold is copied into tensors of the whole at once: kept until the end, small tensors among large temporary
    ones would keep the allocator from giving any memory back.
    """
    tensors: dict[str, Tensor] = {}
    done: dict[str, int] = {}
    error = total = 0.0
    for solution, size in solved:
        wanted = solution.weight.scheme.shapes(*shape)
        for name, part in solution.weight.tensors.items():
            if part.shape == wanted.get(name, part.shape) or not part.ndim:
                tensors[name] = part  # the whole, or the same for all
                continue
            if name not in tensors:
                tensors[name], done[name] = buffers.empty(wanted[name], part.dtype), 0
            tensors[name][done[name] : done[name] + part.shape[0]] = part
            done[name] += part.shape[0]
        error += solution.relative_error * size
        total += size
    weight = QuantizedWeight(solution.weight.scheme, tensors, shape)
    return Solution(weight, error / total if total else 0.0, solution.details, solution.warnings)


def square_sum(solution: Solution, weight: Tensor) -> float:
    if solution.square_sum is not None:
        return solution.square_sum
    return float(weight.float().square().sum(dtype=torch.float64))
