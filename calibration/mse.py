"""Round to nearest with ranges searched for the least squared error of the weights themselves: no data needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.calibration.grids import searched_grids
from aphroquant.calibration.rtn import to_nearest
from aphroquant.calibration.solution import Solution
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.schemes import Scheme


def solve(
    weights: Sequence[Tensor],
    statistics: InputStatistics | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    magnitude: Tensor | None = None,
) -> list[Solution]:
    """Each weight [N, K] as `rtn` rounds it for inputs that are all alike. `magnitude` is as for `rtn`."""
    alike = torch.ones(weights[0].shape[1], device=weights[0].device)
    weights = [weight.float() for weight in weights]
    return to_nearest(weights, searched_grids(weights, alike, scheme, scale_dtype, magnitude), statistics, "searched")
