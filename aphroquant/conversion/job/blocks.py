"""Passed blocks and hidden states of a walk, kept as it goes on, and found again.

Every block is kept. The states behind it are kept if that is cheap (`pace.py`), in a thread, while the next block's
statistics are gathered from them; before they are changed the thread has finished. A conversion goes on behind the
newest whole states that have all their blocks. Two states are there at most: with the newest one damaged, it is the
one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.conversion.job.directory import JobDirectory
from aphroquant.conversion.job.pace import Pace
from aphroquant.conversion.job.passed import pack_passed, unpack_passed
from aphroquant.conversion.job.record import is_whole, read_record
from aphroquant.conversion.passed import PassedBlock

if TYPE_CHECKING:
    from aphroquant.conversion.walk import Walk

BLOCK, STATES = "block", "states"


class BlockKeeper:
    """Keeps the blocks of one walk. `say` tells the user where it goes on."""

    def __init__(self, directory: JobDirectory, num_blocks: int, say: Callable[[str], None]) -> None:
        self._directory, self._num_blocks, self._say = directory, num_blocks, say
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[float] | None = None  # seconds of a processor
        self._pace = Pace()
        self._newest: int | None = None  # states
        self._wanted = True  # states behind the last block

    def passes(self, walk: Walk) -> Iterator[PassedBlock]:
        """All blocks, those that were passed before as they were."""
        done = self._go_on(walk)
        records = self._directory.records(BLOCK)
        for number in range(done):
            yield unpack_passed(read_record(records[number]))
        for passed in walk.passes(done, before_change=self._settle, wants_states=self._wants_states):
            self._keep(passed, walk)
            yield passed
        self._settle()

    def close(self) -> None:
        """Wait for what is being written."""
        self._pool.shutdown()

    def _go_on(self, walk: Walk) -> int:
        """Find the states that the most blocks stand before, and return how many those are."""
        blocks = self._whole_blocks()
        for number, record in sorted(self._directory.records(STATES).items(), reverse=True):
            if number >= blocks:
                continue
            if self._directory.take(record, walk.states(number)) is None:
                self._say(f"the states behind block {number + 1} are damaged and are not used")
                continue
            self._newest = number
            self._directory.drop(BLOCK, range(number + 1, self._num_blocks))
            self._tell(number + 1)
            return number + 1
        return 0

    def _whole_blocks(self) -> int:
        """How many blocks, from the first on, are there."""
        records = self._directory.records(BLOCK)
        for number in range(self._num_blocks):
            if number not in records:
                return number
            if not is_whole(records[number]):
                self._say(f"the record of block {number + 1} is damaged and is not used")
                return number
        return self._num_blocks

    def _tell(self, done: int) -> None:
        if done < self._num_blocks:
            self._say(f"going on from block {done + 1} of {self._num_blocks}: {self._directory.path} has those before")
        else:
            self._say(f"all {self._num_blocks} blocks are solved already: {self._directory.path} has them")

    def _wants_states(self, layer: int) -> bool:
        self._wanted = self._pace.due or layer + 1 == self._num_blocks
        return self._wanted

    def _keep(self, passed: PassedBlock, walk: Walk) -> None:
        states = None
        if self._wanted:
            states = {name: _on_cpu(rows) for name, rows in walk.states(passed.layer).items()}
        self._pending = self._pool.submit(self._write, passed, states)

    def _write(self, passed: PassedBlock, states: dict[str, Tensor] | None) -> float:
        self._directory.put(BLOCK, passed.layer, *pack_passed(passed))
        if states is None:
            return 0.0
        begun = time.thread_time()
        if self._newest is not None:
            self._directory.drop(STATES, range(self._newest))
        self._directory.put(STATES, passed.layer, states, {})
        self._newest = passed.layer
        return time.thread_time() - begun

    def _settle(self) -> None:
        """Wait until nothing reads the states any more. What went wrong in the thread is raised here."""
        if self._pending is None:
            return
        begun, pending = time.monotonic(), self._pending
        self._pending = None
        worked = pending.result()
        if worked:
            self._pace.done(time.monotonic() - begun + worked / torch.get_num_threads())


def _on_cpu(rows: Tensor) -> Tensor:
    """On a GPU, a copy: recording a graph there forbids copies by other threads."""
    return rows if rows.device.type == "cpu" else rows.cpu()
