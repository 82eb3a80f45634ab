"""What a compiled kernel uses, as ptxas reports it: registers, spills, stack, shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """Of one entry function, in bytes where not said otherwise."""

    entry: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_resources(log: str) -> dict[str, Resources]:
    """By entry function, from the log of a compilation with -v."""
    resources = {}
    for part in log.split("Compiling entry function")[1:]:
        entry, spills = _ENTRY.match(f"Compiling entry function{part}"), _SPILLS.search(part)
        registers, shared = _REGISTERS.search(part), _SHARED.search(part)
        assert entry and spills and registers, f"unknown ptxas report: {part}"
        stack, stores, loads = map(int, spills.groups())
        resources[entry[1]] = Resources(
            entry[1], int(registers[1]), stores, loads, stack, int(shared[1]) if shared else 0
        )
    return resources
