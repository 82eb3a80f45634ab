"""Which settings of a kernel are fastest, from tables that were measured and checked in: tables/KERNEL.GPU.json.

A kernel asks for its plan by the kind of weight and the size of the product. The plan is that of the measured size
nearest by (the factors between outputs, inputs and, counting twice, tokens), on this GPU or else on one of the same
architecture. Where nothing was measured, the kernel's own estimate decides. scripts/tune_kernels makes the tables from
what the kernels' folders list in a module `tuning.py`, as a tuple TUNABLES.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.variants import Macro

TABLES = Path(__file__).parent / "tables"

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Problem:
    """A product: the kind of weight ("bits=4 group=128 zeros=0 bfloat16"), and its size."""

    kind: str
    out_features: int
    in_features: int
    tokens: int


@dataclass(frozen=True)
class Tunable:
    """A kernel with plans to choose among. A plan is a frozen dataclass of numbers and booleans.

    `prepare(problem, plan, copies)` gives so many calls, each on its own copy of a weight, which return what they
    computed; the results of all plans of a problem must be about the same.
    """

    name: str
    plan: type[Any]
    problems: Callable[[], Iterable[Problem]]
    candidates: Callable[[Problem], Sequence[Any]]
    prepare: Callable[[Problem, Any, int], Sequence[Callable[[], Any]]]
    weight_bytes: Callable[[Problem], int]
    sources: Callable[[Problem, Any], Iterable[tuple[str, Mapping[str, Macro]]]]  # to compile, with macros


@dataclass(frozen=True)
class Entry:
    """The fastest plan of a problem, and its microseconds."""

    problem: Problem
    plan: dict[str, int | bool | None]
    microseconds: float


def all_tunables() -> list[Tunable]:
    """Of every folder that lists some."""
    found: list[Tunable] = []
    for path in sorted(Path(__file__).parent.glob("*/tuning.py")):
        found += importlib.import_module(f"aphroquant.kernels.cuda.{path.parent.name}.tuning").TUNABLES
    return found


def tuned(kernel: str, plan: type[Plan], problem: Problem, device: int) -> Plan | None:
    """The measured plan nearest to the problem; None if there is no table, or none of that kind of weight."""
    kind: Any = plan
    found: Plan | None = _tuned(kernel, kind, problem, device)
    return found


@lru_cache(maxsize=8192)  # asked for at every launch
def _tuned(kernel: str, plan: type[Any], problem: Problem, device: int) -> Any:
    entry = tuned_entry(kernel, problem, device)
    return None if entry is None else plan(**entry.plan)


def tuned_entry(kernel: str, problem: Problem, device: int) -> Entry | None:
    """As `tuned`, with the problem that was measured."""
    found = gpu(device)
    return nearest(load_table(kernel, found.name, found.architecture), problem)


def nearest(table: tuple[Entry, ...], problem: Problem) -> Entry | None:
    """Of the same kind of weight, the entry whose size differs by the smallest factors. On a tie, the first."""
    same_kind = [entry for entry in table if entry.problem.kind == problem.kind]
    return min(same_kind, key=lambda entry: _distance(entry.problem, problem), default=None)


@cache
def load_table(kernel: str, gpu_name: str, architecture: str, folder: Path = TABLES) -> tuple[Entry, ...]:
    """The table of that GPU; else of another with the same architecture, by name; else empty."""
    exact = table_path(kernel, gpu_name, folder)
    if exact.is_file():
        return _entries(json.loads(exact.read_text()))
    for path in sorted(folder.glob(f"{kernel}.*.json")):
        document = json.loads(path.read_text())
        if document["architecture"] == architecture:
            return _entries(document)
    return ()


def table_path(kernel: str, gpu_name: str, folder: Path = TABLES) -> Path:
    """Where the table of a kernel for a GPU is kept."""
    return folder / f"{kernel}.{re.sub('[^a-z0-9]+', '-', gpu_name.lower()).strip('-')}.json"


def write_table(path: Path, gpu_name: str, architecture: str, conditions: dict[str, Any], entries: list[Entry]) -> None:
    """One entry a line, so that a difference can be read. `conditions`: versions, ceilings, date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"gpu": gpu_name, "architecture": architecture, "conditions": conditions})[1:-1]
    lines = ",\n".join("  " + json.dumps(_to_json(entry)) for entry in entries)
    path.write_text(f'{{{head}, "entries": [\n{lines}\n]}}\n')


def plan_dict(plan: Any) -> dict[str, int | bool | None]:
    """A plan's numbers by name."""
    return {field.name: getattr(plan, field.name) for field in fields(plan)}


def _to_json(entry: Entry) -> dict[str, Any]:
    problem = entry.problem
    return {
        "kind": problem.kind,
        "n": problem.out_features,
        "k": problem.in_features,
        "m": problem.tokens,
        "us": round(entry.microseconds, 3),
        "plan": entry.plan,
    }


def _entries(document: dict[str, Any]) -> tuple[Entry, ...]:
    return tuple(
        Entry(Problem(line["kind"], line["n"], line["k"], line["m"]), line["plan"], line["us"])
        for line in document["entries"]
    )


def _distance(measured: Problem, wanted: Problem) -> float:
    return (
        abs(math.log2(measured.out_features / wanted.out_features))
        + abs(math.log2(measured.in_features / wanted.in_features))
        + 2 * abs(math.log2(measured.tokens / wanted.tokens))
    )
