"""What a walk makes of one block of the source."""

from __future__ import annotations

from dataclasses import dataclass

from aphroquant.calibration.statistics import InputStatistics
from aphroquant.conversion.blocks import SolvedBlock


@dataclass(frozen=True)
class PassedBlock:
    """`solved` by each branch, in their order; `statistics` of the inputs of its layers in the source, by module, if
    anyone wants them."""

    layer: int
    solved: list[SolvedBlock]
    statistics: dict[str, InputStatistics]
