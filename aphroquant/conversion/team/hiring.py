"""Starting the other workers, and telling what became of them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from aphroquant import errors
from aphroquant.conversion.conversion import Conversion
from aphroquant.conversion.team.cluster import cluster_team, is_cluster
from aphroquant.conversion.team.orders import READY, Orders
from aphroquant.conversion.team.team import ALONE, MAX_WORKERS, Team
from aphroquant.devices import torch_device
from aphroquant.errors import AphroquantError, ResourceError, UsageError

AUTO = "auto"
_SECONDS_TO_END = 10.0


def num_workers(wanted: str | int, device: torch.device, num_windows: int) -> int:
    """How many processes on this machine. "auto": one for each GPU, and one on CPUs. UsageError for too many."""
    if is_cluster(wanted):
        return 1
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if wanted == AUTO:
        return max(1, min(gpus, num_windows, MAX_WORKERS))
    try:
        count = int(wanted)
    except ValueError as error:
        raise UsageError(f"--workers {wanted} must be a number, {AUTO}, ray, ray:N or ray://HOST:PORT") from error
    if not 1 <= count <= MAX_WORKERS:
        raise UsageError(f"--workers {count} must be between 1 and {MAX_WORKERS}")
    if count > num_windows:
        raise UsageError(f"--workers {count} are more than the {num_windows} windows of calibration text")
    if device.type == "cuda" and count > gpus:
        raise UsageError(f"--workers {count} need as many GPUs, and torch sees {gpus}")
    return count


def check_workers(wanted: str | int, device: str, num_windows: int) -> None:
    """What `num_workers` refuses, before anything is read. `num_windows` is 0 if there is no calibration text."""
    if str(wanted) != "1":  # which needs no device to be found
        num_workers(wanted, torch_device(device), num_windows or MAX_WORKERS)


def hired(
    wanted: str | int, conversions: Sequence[Conversion], windows: torch.Tensor, device: torch.device, *, observes: bool
) -> AbstractContextManager[Team]:
    """The team that `--workers` names, this process being its first. What ends a worker is raised here.

    With a cluster this process has to be connected.
    """
    if is_cluster(wanted):
        return nullcontext(cluster_team())
    count = num_workers(wanted, device, len(windows))
    return nullcontext(ALONE) if count == 1 else _processes(count, conversions, windows, device, observes=observes)


def threads_of_each(count: int) -> int:
    """How many threads each of so many workers has."""
    return max(1, torch.get_num_threads() // count)


@contextmanager
def _processes(
    count: int, conversions: Sequence[Conversion], windows: torch.Tensor, device: torch.device, *, observes: bool
) -> Iterator[Team]:
    from aphroquant.conversion.team.processes import is_parting, joined

    threads = torch.get_num_threads()
    requests = [(conversion.resolved, conversion.reason) for conversion in conversions]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
    with tempfile.TemporaryDirectory(prefix="aphroquant-team-") as folder:
        address, left = f"file://{folder}/store", [Path(folder) / f"error-{rank}.json" for rank in range(count)]
        share = threads_of_each(count)
        helpers = [
            _started(Orders(requests, windows, observes, address, rank, count, share, left[rank]))
            for rank in range(1, count)
        ]
        torch.set_num_threads(share)
        try:
            for helper in helpers:
                _wait_for(helper, helpers, left[1:])
            with joined(address, 0, count, device) as team:
                yield team
        except RuntimeError as error:
            if not is_parting(error):
                raise
            raise _of_helpers(helpers, left[1:]) from error
        finally:
            torch.set_num_threads(threads)
            _end(helpers)


def _started(orders: Orders) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "aphroquant.conversion.team.helper"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    try:
        process.stdin.write(pickle.dumps(orders))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended; whoever waits for it finds out
    return process


def _wait_for(
    helper: subprocess.Popen[bytes], helpers: Sequence[subprocess.Popen[bytes]], left: Sequence[Path]
) -> None:
    """Until it has planned what this process has: who ends before that would be waited for without end."""
    assert helper.stdout is not None
    if helper.stdout.readline() != READY:
        raise _of_helpers(helpers, left)


def _of_helpers(helpers: Sequence[subprocess.Popen[bytes]], left: Sequence[Path]) -> Exception:
    """What ended a worker."""
    limit = time.monotonic() + _SECONDS_TO_END
    while time.monotonic() < limit and all(helper.poll() is None for helper in helpers):
        time.sleep(0.05)
    for path in left:
        if path.exists():
            told = json.loads(path.read_text(encoding="utf-8"))
            kind: type[AphroquantError] = getattr(errors, told["kind"])
            return kind(told["message"], hint=told["hint"])
    for rank, helper in enumerate(helpers, 2):
        if (code := helper.poll()) is not None and code < 0:
            return ResourceError(
                f"worker {rank} of {len(helpers) + 1} was killed by signal {-code}",
                hint="if memory was short, give fewer --workers",
            )
    return AphroquantError("a worker has ended, for a reason that it did not tell")


def _end(helpers: Sequence[subprocess.Popen[bytes]]) -> None:
    """They end by themselves with the team; one that does not is made to."""
    for helper in helpers:
        try:
            helper.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            helper.kill()
            helper.wait()
        for pipe in (helper.stdin, helper.stdout):
            if pipe is not None:
                pipe.close()
