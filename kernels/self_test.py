"""Short checks of kernels against a reference of higher precision, which `aphroquant doctor` runs.

They run in a process of their own, so that a kernel that crashes is a finding and not the end of the report.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from aphroquant.errors import AphroquantError

DEVICES = ("cpu", "cuda")
_TIMEOUT = 600.0  # seconds for all tests


@dataclass(frozen=True)
class SelfTest:
    """`run` gives a relative error, ||out - reference|| / ||reference||, which must not exceed `tolerance`."""

    name: str
    run: Callable[[], float]
    tolerance: float


@dataclass(frozen=True)
class Outcome:
    """What a self-test found. `problem` is None if it passed."""

    name: str
    error: float | None
    tolerance: float
    seconds: float
    problem: str | None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; infinite if anything found is not a number."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")


def self_tests(device: str) -> list[SelfTest]:
    """Of the kernels that can run on that device."""
    if device == "cuda":
        from aphroquant.kernels.cuda.self_test import all_self_tests

        return all_self_tests()
    from aphroquant.kernels.cpu.self_test import cpu_self_tests

    return cpu_self_tests()


def run_self_tests(device: str) -> Iterator[Outcome]:
    """Run them all in another process, and in a new one after a crash."""
    done = 0
    while True:
        command = [sys.executable, "-m", "aphroquant.kernels.self_test", device, str(done)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        outcomes = [line for line in lines if "error" in line]
        yield from (Outcome(**line) for line in outcomes)
        if child.returncode == 0:
            return
        started = [line for line in lines if "starts" in line]
        last_words = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        problem = f"the process ended with code {child.returncode}: {last_words}"
        if len(started) == len(outcomes):  # not in a test: nothing further can be run
            yield Outcome(f"{device}: self-tests", None, 0.0, 0.0, problem)
            return
        yield Outcome(started[-1]["starts"], None, 0.0, 0.0, problem)
        done += len(started)


def run_one(test: SelfTest) -> Outcome:
    """Run a test in this process."""
    start = time.perf_counter()
    error, problem = None, None
    try:
        error = test.run()
        if not error <= test.tolerance:
            problem = f"relative error {error:.2e} exceeds {test.tolerance:.0e}"
    except (AphroquantError, RuntimeError, ValueError, TypeError, OSError, AssertionError) as failure:
        problem = f"{type(failure).__name__}: {failure}"
    finite = error if error is not None and error < float("inf") else None
    return Outcome(test.name, finite, test.tolerance, time.perf_counter() - start, problem)


def _main() -> None:
    device, first = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(0)
    for test in self_tests(device)[first:]:
        print(json.dumps({"starts": test.name}), flush=True)
        print(json.dumps(run_one(test).to_dict()), flush=True)


if __name__ == "__main__":
    _main()
