"""Measures which settings of the CUDA kernels are fastest on this GPU, and writes the tables that they choose by.

For each problem that kernels/cuda/*/tuning.py list, all candidates are timed briefly, and the best few again at length,
while those of the problems behind it are compiled in the background. A candidate whose result differs from the others'
is told and never chosen. Problems that are left out, or left when time runs out, keep what an older table says of them:
that of this GPU, or else of another one with the same architecture.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aphroquant.errors import AphroquantError
from aphroquant.kernels.cuda.compiler import compile_kernel
from aphroquant.kernels.cuda.device import Gpu, architecture, gpu, require
from aphroquant.kernels.cuda.timing import num_copies, read_bandwidth, time_rotated
from aphroquant.kernels.cuda.toolchain import driver_version
from aphroquant.kernels.cuda.tuning import (
    TABLES,
    Entry,
    Problem,
    Tunable,
    all_tunables,
    load_table,
    plan_dict,
    table_path,
    write_table,
)
from aphroquant.kernels.cuda.variants import Macro

_FINALISTS, _BRIEF, _LONG = 4, 5, 21  # replays
_SAMPLED = 64  # tokens from each end that are compared
_MAX_DIFFERENCE = 1e-2  # between the results of two plans, relative; rounding to bf16 makes 3e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--kind", default="", help="weights whose kind contains this, such as bits=4")
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="only these numbers of tokens")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this time")
    parser.add_argument("--tables", type=Path, default=TABLES, help="where the tables are written")
    arguments = parser.parse_args()
    require()
    found, end = gpu(torch.cuda.current_device()), time.monotonic() + arguments.seconds
    conditions = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "driver_cuda": driver_version(),
        "read_gb_per_s": round(read_bandwidth() / 1e9),
    }
    for tunable in all_tunables():
        if arguments.only not in tunable.name:
            continue
        path = table_path(tunable.name, found.name, arguments.tables)
        save = partial(write_table, path, found.name, found.architecture, conditions)
        problems = [problem for problem in tunable.problems() if _is_asked_for(problem, arguments)]
        entries = tune(tunable, problems, found, end, arguments.tables, save)
        print(f"{path}: {len(entries)} entries", flush=True)
    return 0


def _is_asked_for(problem: Problem, arguments: argparse.Namespace) -> bool:
    return arguments.kind in problem.kind and (not arguments.tokens or problem.tokens in arguments.tokens)


class Compilation:
    """Compiles kernels in the background, in the order in which they are asked for."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self._jobs: dict[tuple[str, tuple[tuple[str, Macro], ...]], Future[object]] = {}

    def ask(self, sources: Iterable[tuple[str, Mapping[str, Macro]]]) -> list[Future[object]]:
        """A job for each source with its macros, the same for the same."""
        jobs = []
        for name, macros in sources:
            key = (name, tuple(sorted(macros.items())))
            if key not in self._jobs:
                self._jobs[key] = self._pool.submit(compile_kernel, name, macros, architecture())
            jobs.append(self._jobs[key])
        return jobs

    def end(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def tune(
    tunable: Tunable,
    problems: list[Problem],
    found: Gpu,
    end: float,
    tables: Path,
    save: Callable[[list[Entry]], None],
) -> list[Entry]:
    """The fastest plan of each problem. What was found so far is saved after each one."""
    own = tables if table_path(tunable.name, found.name, tables).is_file() else TABLES
    table = load_table(tunable.name, found.name, found.architecture, own)
    older = {entry.problem: entry for entry in table}
    plans = [_plans(tunable, problem, older.get(problem)) for problem in problems]
    compilation = Compilation()
    jobs = [
        compilation.ask(source for plan in candidates for source in tunable.sources(problem, plan))
        for problem, candidates in zip(problems, plans, strict=True)
    ]
    for problem, candidates, waiting in zip(problems, plans, jobs, strict=True):
        if time.monotonic() > end:
            print(f"{tunable.name}: no time left for {problem}", flush=True)
            break
        wait(waiting)
        best = fastest(tunable, problem, candidates)
        if best is not None:
            older[problem] = best
            save(list(older.values()))
            print(f"{tunable.name} {problem}: {best.microseconds:.2f} us, {best.plan}", flush=True)
    compilation.end()
    return list(older.values())


def _plans(tunable: Tunable, problem: Problem, older: Entry | None) -> list[Any]:
    """The candidates, and what was fastest before."""
    plans = list(tunable.candidates(problem))
    before = None if older is None else tunable.plan(**older.plan)
    return plans if before is None or before in plans else [*plans, before]


def fastest(tunable: Tunable, problem: Problem, plans: Iterable[Any]) -> Entry | None:
    """Of the candidates that run and agree."""
    copies = num_copies(tunable.weight_bytes(problem))
    brief: list[tuple[float, Any, torch.Tensor]] = []
    for plan in plans:
        try:
            calls = tunable.prepare(problem, plan, copies)
            brief.append((time_rotated(calls, _BRIEF), plan, _sample(calls[0]())))
        except (AphroquantError, RuntimeError, ValueError) as error:
            print(f"{tunable.name} {problem} {plan}: {str(error).splitlines()[0]}", flush=True)
    if not brief:
        return None
    expected = torch.stack([result for _, _, result in brief]).median(0).values
    agreeing = []
    for microseconds, plan, result in brief:
        difference = float((result - expected).norm() / expected.norm())
        if difference <= _MAX_DIFFERENCE:
            agreeing.append((microseconds, plan))
        else:
            print(f"{tunable.name} {problem} {plan}: WRONG, differs by {difference:.1e}", flush=True)
    finalists = sorted(agreeing, key=lambda pair: pair[0])[:_FINALISTS]
    timed = [(time_rotated(tunable.prepare(problem, plan, copies), _LONG), plan) for _, plan in finalists]
    microseconds, plan = min(timed, key=lambda pair: pair[0])
    return Entry(problem, plan_dict(plan), microseconds)


def _sample(result: torch.Tensor) -> torch.Tensor:
    """The first and last tokens: all of a large product for every plan would fill the memory."""
    return torch.cat([result[:_SAMPLED], result[-_SAMPLED:]]).float()


if __name__ == "__main__":
    sys.exit(main())
