"""Solving on a Ray cluster: layers that share an input, and experts, each as a task of its own.

Statistics are gathered here. Workers have the same version of this package; they use the processors that Ray gives
them. A task is sent as tensors, and comes back as a solution, or as what was wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

import aphroquant
from aphroquant import errors
from aphroquant.calibration.solution import Solution
from aphroquant.conversion.team.task import SolveTask
from aphroquant.conversion.team.team import Team
from aphroquant.errors import AphroquantError, ResourceError, UsageError

PREFIX = "ray"
CPU = torch.device("cpu")
Item = TypeVar("Item")
_TASKS_A_WORKER = 2  # at once: one is on its way while another is solved
_Answer = tuple[dict[str, Solution] | None, tuple[str, str, str | None] | None]


class ClusterTeam(Team):
    """This process, which has others solve for it."""

    def __init__(self, ray: Any, num_threads: int) -> None:
        self._ray, self._num_threads = ray, num_threads
        self._remote = ray.remote(_answer)

    def solve(self, items: Sequence[Item], work: Callable[[list[Item]], dict[Item, Any]]) -> dict[Item, Any]:
        """Each item in a thread, which waits for the tasks of it."""
        found: dict[Item, Any] = {}
        with ThreadPoolExecutor(max_workers=self._num_threads) as pool:
            for part in pool.map(work, ([item] for item in items)):
                found |= part
        return found

    def solutions(self, task: SolveTask) -> dict[str, Solution]:
        try:
            solved, told = self._ray.get(self._remote.remote(task.to(CPU), aphroquant.__version__))
        except self._ray.exceptions.RayError as error:
            raise ResourceError(
                f"the Ray cluster gave no solution of {', '.join(task.weights)}: {str(error).splitlines()[0]}",
                hint="look at ray status; a worker may have run out of memory, or lack this package",
            ) from error
        if told is not None:
            kind, message, hint = told
            raise getattr(errors, kind)(message, hint=hint)
        device = next(iter(task.weights.values())).device
        assert solved is not None
        return {name: replace(solution, weight=solution.weight.to(device)) for name, solution in solved.items()}


@contextmanager
def connected(wanted: str | int) -> Iterator[None]:
    """With the cluster of "ray" (this machine), "ray:N" (N workers on it), or "ray://HOST:PORT", if it is one of them.

    UsageError if Ray is not installed, or nothing answers there.
    """
    if not is_cluster(wanted):
        yield
        return
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--workers {wanted} needs Ray", hint="pip install 'aphroquant[ray]'") from error
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(log_to_driver=False, **_place(str(wanted)))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--workers {wanted}: no Ray cluster answers: {str(error).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def cluster_team() -> Team:
    """That of the cluster which this process is connected to."""
    import ray

    return ClusterTeam(ray, _num_threads(ray))


def is_cluster(wanted: str | int) -> bool:
    """Whether `--workers` names one. UsageError for what looks like it and is none."""
    if not str(wanted).startswith(PREFIX):
        return False
    _place(str(wanted))
    return True


def _place(wanted: str) -> dict[str, Any]:
    """What ray.init is to be told."""
    if wanted == PREFIX:
        return {"include_dashboard": False}
    if wanted.startswith(f"{PREFIX}://") and len(wanted) > len(f"{PREFIX}://"):
        return {"address": wanted}
    count = wanted.removeprefix(f"{PREFIX}:")
    if not count.isdecimal() or not 1 <= int(count) <= 1024:
        raise UsageError(f"--workers {wanted} must be a number, auto, ray, ray:N or ray://HOST:PORT")
    return {"num_cpus": int(count), "include_dashboard": False}


def _num_threads(ray: Any) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)) * _TASKS_A_WORKER)


def _answer(task: SolveTask, version: str) -> _Answer:
    """What a worker of the cluster does."""
    try:
        if version != aphroquant.__version__:
            raise UsageError(f"a worker of the cluster has aphroquant {aphroquant.__version__}, and not {version}")
        return task.solve(), None
    except AphroquantError as error:
        return None, (type(error).__name__, error.message, error.hint)
