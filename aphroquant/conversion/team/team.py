"""What workers do with one another, for one that is alone; `processes.py` has it for several.

All workers run the same walk. Windows are cut into groups, the same for any number of workers, and each worker has the
hidden states of its own groups. Statistics are summed group by group, in their order, so that the sums do not depend
on how many workers there are. Layers that share an input, and experts, are solved by different workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from aphroquant.calibration.solution import Solution
from aphroquant.calibration.statistics import InputStatistics, StatisticsCollector
from aphroquant.conversion.activations import chunks
from aphroquant.conversion.team.task import SolveTask

MAX_WORKERS = 8
Value = TypeVar("Value")
Item = TypeVar("Item")


def groups(num_tokens: int, window_len: int) -> list[slice]:
    """Consecutive rows of whole windows, for each worker at least one if there are so many windows."""
    num_windows = num_tokens // window_len
    count = min(MAX_WORKERS, num_windows)
    ends = [num_windows * (number + 1) // count * window_len for number in range(count)]
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def chunks_of(group: slice, window_len: int) -> Iterator[slice]:
    """The rows of a group, a part at a time."""
    for part in chunks(group.stop - group.start, window_len):
        yield slice(group.start + part.start, group.start + part.stop)


class Team:
    """A worker alone."""

    size = 1
    rank = 0

    def owner(self, number: int, count: int) -> int:
        """Which worker has one of `count` groups."""
        return number * self.size // count

    def own(self, all_groups: Sequence[slice]) -> list[slice]:
        """The groups of this worker."""
        count = len(all_groups)
        return [group for number, group in enumerate(all_groups) if self.owner(number, count) == self.rank]

    def statistics(
        self, all_groups: Sequence[slice], collected: Callable[[slice], StatisticsCollector]
    ) -> InputStatistics:
        """Of the tokens of all groups. `collected` gives a new collector that has seen those of one group."""
        total: StatisticsCollector | None = None
        for group in all_groups:
            part = collected(group)
            if total is None:
                total = part
            else:
                total.add(group.stop - group.start, part.sums())
        assert total is not None
        return total.finish()

    def hand_out(self, rows: Tensor) -> None:
        """Fill in all rows, as the first worker has them."""

    def complete(self, rows: Tensor, all_groups: Sequence[slice]) -> None:
        """Fill in the rows [T, H] of the groups that other workers have."""

    def chosen_rows(self, rows: Tensor, index: Tensor, all_groups: Sequence[slice]) -> Tensor:
        """Some rows of all groups; `index` is sorted."""
        return rows[index.to(rows.device)]

    def tell(self, value: Value) -> Value:
        """What the first worker says."""
        return value

    def solve(self, items: Sequence[Item], work: Callable[[list[Item]], dict[Item, Any]]) -> dict[Item, Any]:
        """What `work` makes of each item, whoever does it. The result of each must not depend on the others."""
        return work(list(items))

    def solutions(self, task: SolveTask) -> dict[str, Solution]:
        """What becomes of a task, wherever it is done."""
        return task.solve()


ALONE = Team()
