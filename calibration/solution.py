"""What a solver gives back: a quantized weight, how wrong it is, and what the report should say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aphroquant.calibration.statistics import InputStatistics
from aphroquant.kernels.reference.matmul import linear
from aphroquant.schemes import QuantizedWeight, Scheme


@dataclass(frozen=True)
class Solution:
    """`relative_error` is the squared error of the layer's output over calibration, relative to the output's square
    (of the weight, where nothing is known of the input). `details` go into the report; `warnings` to the user.
    `square_sum` is that of the weight before rounding, if it was found on the way."""

    weight: QuantizedWeight
    relative_error: float
    details: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    square_sum: float | None = None


# Weights [N, K] of layers that share an input, its statistics, the scheme, and the dtype that scales are stored in.
# Layers are solved together because what costs time belongs to the input, and so that they share the scale of a tensor
# where engines, which multiply them as one layer, want that (NVFP4); else the result of each does not depend on others.
Rounding = Callable[[Sequence[Tensor], InputStatistics | None, Scheme, torch.dtype], list[Solution]]
# The same with E[g g^T] [N, N] of the gradients by each weight's outputs, where it is known.
TwoSidedRounding = Callable[
    [Sequence[Tensor], InputStatistics | None, Scheme, torch.dtype, Sequence[Tensor | None]], list[Solution]
]


def relative_error(weight: Tensor, rounded: Tensor, statistics: InputStatistics | None) -> float:
    """sum E[((w - r) x)**2] / sum E[(w x)**2]; with E[x**2] for the products where E[x x^T] is not known."""
    error = weight - rounded
    if statistics is None:
        before, after = weight.square().sum(), error.square().sum()
    elif statistics.second_moment is None:
        before, after = ((part.square() @ statistics.mean_square).sum() for part in (weight, error))
    else:
        before, after = (quadratic_form(part, statistics.second_moment).sum() for part in (weight, error))
    return float(after / before) if before > 0 else 0.0


def quadratic_form(rows: Tensor, moment: Tensor) -> Tensor:
    """r H r^T for each row r of [N, K], with H [K, K] symmetric."""
    return (linear(rows, moment) * rows).sum(1)
