"""What a weight may become under a scheme: the interface between schemes' numbers and the ways of rounding to them.

A `WeightGrid` has fixed scales (and zero points); whoever rounds chooses codes. `Points` say the same one column after
another, which is all that error feedback needs to know of a scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from aphroquant.schemes import FloatScheme, IntegerScheme, LookupScheme, QuantizedWeight, Scheme


class Points(Protocol):
    """The numbers that each element of a weight [N, K] may become.

    `parameters` are float32 [N, K] each: what tells one element's numbers from another's.
    """

    @property
    def parameters(self) -> tuple[Tensor, ...]: ...

    def round(self, values: Tensor, parameters: Sequence[Tensor], codes: Tensor, errors: Tensor) -> None:
        """The nearest codes to values [N] of one column, as float32, and values - rounded values, into the last two.

        `parameters` are those of the column. Nothing may be decided by values on a GPU: the work is recorded.
        """


class WeightGrid(Protocol):
    """The numbers that a weight [N, K] may become, scales and zero points fixed."""

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest codes, uint8 [N, K]."""

    def decode(self, codes: Tensor) -> Tensor:
        """The weight [N, K] in float32 that codes stand for."""

    def points(self) -> Points: ...

    def quantized(self, codes: Tensor) -> QuantizedWeight:
        """The canonical form, without what belongs to the inputs."""


def plain_grids(
    weights: Sequence[Tensor], scheme: Scheme, scale_dtype: torch.dtype, magnitude: Tensor | None = None
) -> list[WeightGrid]:
    """Grids that just cover each group's values, as other libraries choose them. The weights share an input.

    `magnitude` [] is the greatest of all weights that share a scale of the whole, if these are only a part of them.
    """
    if isinstance(scheme, LookupScheme):
        from aphroquant.calibration import lookup_grid

        return [*lookup_grid.plain_grids(weights, scheme, magnitude)]
    from aphroquant.calibration import integer_grid

    assert isinstance(scheme, IntegerScheme)
    return [
        integer_grid.IntegerWeightGrid(
            integer_grid.min_max_grid(weight, scheme, scale_dtype), scheme, scale_dtype, weight.shape[1]
        )
        for weight in weights
    ]


def searched_grids(
    weights: Sequence[Tensor],
    importance: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    magnitude: Tensor | None = None,
) -> list[WeightGrid]:
    """Grids of the least sum of importance * (rounding error)**2 per group; importance [K] may be E[x**2]."""
    if isinstance(scheme, LookupScheme):
        from aphroquant.calibration import lookup_grid

        return [*lookup_grid.searched_grids(weights, importance, scheme, magnitude)]
    if isinstance(scheme, FloatScheme):
        from aphroquant.calibration import float8_grid

        return [*float8_grid.searched_grids(weights, importance, scheme)]
    from aphroquant.calibration import integer_grid

    assert isinstance(scheme, IntegerScheme)
    return [
        integer_grid.IntegerWeightGrid(
            integer_grid.search_grid(weight, importance, scheme, scale_dtype), scheme, scale_dtype, weight.shape[1]
        )
        for weight in weights
    ]
