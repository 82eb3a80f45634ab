"""Several processes, each with a processor's share or a GPU, through torch.distributed: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from aphroquant.calibration.statistics import InputStatistics, StatisticsCollector
from aphroquant.conversion.team.team import Team
from aphroquant.errors import UsageError

Value = TypeVar("Value")
Item = TypeVar("Item")
_PATIENCE = timedelta(days=7)  # a worker that ends closes its connections: nobody waits for it


class ProcessTeam(Team):
    """This process as one of several."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        """`device`: where statistics and states are."""
        self.rank, self.size, self._device = rank, size, device

    def statistics(
        self, all_groups: Sequence[slice], collected: Callable[[slice], StatisticsCollector]
    ) -> InputStatistics:
        count, total, held = len(all_groups), None, []
        for group in self.own(all_groups):
            part = collected(group)
            if self.rank:
                held.append(part)
            elif total is None:
                total = part
            else:
                total.add(group.stop - group.start, part.sums())
        for part in held:
            for tensor in part.sums():
                dist.send(tensor, 0)
        if total is not None:  # of the first worker, which has the first group
            for number, group in enumerate(all_groups):
                if (sender := self.owner(number, count)) != 0:
                    total.add(group.stop - group.start, self._received(total.sums(), sender))
        found = total.finish() if total is not None else None
        return self._statistics_of_first(found)

    def hand_out(self, rows: Tensor) -> None:
        self._shared(rows, 0)

    def complete(self, rows: Tensor, all_groups: Sequence[slice]) -> None:
        for number, group in enumerate(all_groups):
            self._shared(rows[group], self.owner(number, len(all_groups)))

    def chosen_rows(self, rows: Tensor, index: Tensor, all_groups: Sequence[slice]) -> Tensor:
        chosen, place = [], index.to(rows.device)
        for number, group in enumerate(all_groups):
            part = rows[place[(place >= group.start) & (place < group.stop)]]
            self._shared(part, self.owner(number, len(all_groups)))
            chosen.append(part)
        return torch.cat(chosen)

    def tell(self, value: Value) -> Value:
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def solve(self, items: Sequence[Item], work: Callable[[list[Item]], dict[Item, Any]]) -> dict[Item, Any]:
        own = list(items[self.rank :: self.size])
        parts: list[dict[Item, Any]] = [{} for _ in range(self.size)]
        dist.all_gather_object(parts, work(own) if own else {})
        found = {item: result for part in parts for item, result in part.items()}
        return {item: found[item] for item in items}

    def _shared(self, rows: Tensor, owner: int) -> None:
        """Fill in rows as their owner has them: through memory, since one worker may have them there, and another on
        its GPU."""
        part = rows.cpu()
        dist.broadcast(part, owner)
        if part is not rows and owner != self.rank:
            rows.copy_(part)

    def _received(self, like: Sequence[Tensor], sender: int) -> list[Tensor]:
        received = [torch.empty_like(tensor) for tensor in like]
        for tensor in received:
            dist.recv(tensor, sender)
        return received

    def _statistics_of_first(self, found: InputStatistics | None) -> InputStatistics:
        shapes = self.tell(None if found is None else _shapes(found))
        assert shapes is not None
        num_tokens, own = shapes[0], list[Tensor | None]()
        for number, shape in enumerate(shapes[1]):
            tensor = None if found is None else found[1:][number]
            if shape is None:
                own.append(None)
                continue
            filled = torch.empty(shape, device=self._device) if tensor is None else tensor.contiguous()
            dist.broadcast(filled, 0)
            own.append(filled)
        return InputStatistics(num_tokens, *own)  # type: ignore[arg-type]


@contextmanager
def joined(address: str, rank: int, size: int, device: torch.device) -> Iterator[Team]:
    """This process as a member of the team that meets at an address of torch.distributed."""
    if dist.is_initialized():
        raise UsageError(
            "torch.distributed is in use already, so that --workers cannot be", hint="convert in a process of its own"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield ProcessTeam(rank, size, device)
    finally:
        dist.destroy_process_group()


def is_parting(error: BaseException) -> bool:
    """Whether it says that another worker has closed its connections."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _shapes(found: InputStatistics) -> tuple[int, list[tuple[int, ...] | None]]:
    return found.num_tokens, [None if tensor is None else tuple(tensor.shape) for tensor in found[1:]]
