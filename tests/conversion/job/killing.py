"""Conversions that are killed again and again, in forks of one process: to import torch takes longer than to convert.

    python killing.py SOURCE FOLDER KILLS SEED < options.json

Half of the kills come after a random time, half at a random file operation. When an output is there it is compared
with an undisturbed one; then the next begins. Prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers  # noqa: F401 (loaded once for all forks)

import aphroquant
import aphroquant.conversion.run
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion.job import pace

RECORDS = ("aphroquant.json", "SHA256SUMS")  # which tell times, and the sums of files that do
MEASURED = ("timings", "environment")


def fork(work: Callable[[], None]) -> int:
    """A child process that does `work` and ends with 0, or 1 and a traceback."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(seconds: float, child: int) -> int:
    """Kill a child after that time, unless it ends before."""
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    code = ended(child)
    timer.cancel()
    return code


def killed_at(operation: int, work: Callable[[], None]) -> None:
    """Kill this process at its so many-th file operation from now on."""
    left = operation

    def count(event: str, arguments: Any) -> None:
        nonlocal left
        if event == "open" or event.startswith("os."):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work()


def counted(work: Callable[[], None], report: Path) -> None:
    """How many file operations `work` takes."""
    total = 0

    def count(event: str, arguments: Any) -> None:
        nonlocal total
        total += event == "open" or event.startswith("os.")

    sys.addaudithook(count)
    work()
    report.write_text(str(total))


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in RECORDS}
    told = json.loads((out / "aphroquant.json").read_text())
    return found | {"told": {key: value for key, value in told.items() if key not in MEASURED}}


def main(source: str, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    pace.SHARE = 1e9  # at every block, however quick it is
    open_checkpoint(source).tokenizer()  # what it imports, all forks have
    options, draw = json.load(sys.stdin), random.Random(seed)

    def convert(out: Path) -> Callable[[], None]:
        def work() -> None:
            aphroquant.convert(source, out=out, **options)

        return work

    begun = time.monotonic()
    assert ended(fork(lambda: counted(convert(folder / "undisturbed" / "out"), folder / "operations"))) == 0
    duration, operations = time.monotonic() - begun, int((folder / "operations").read_text())
    expected = content(folder / "undisturbed" / "out")
    told: dict[str, Any] = {"kills": 0, "outputs": 0, "differ": [], "left": []}
    while told["kills"] < kills:
        out = folder / f"out-{told['outputs']}" / "out"
        while not out.exists():
            if told["kills"] % 2:
                code = ended(fork(partial(killed_at, draw.randrange(1, operations), convert(out))))
            else:
                code = killed_after(draw.uniform(0, duration), fork(convert(out)))
            assert code in (0, -signal.SIGKILL), f"ended with {code}"
            told["kills"] += code != 0
        if content(out) != expected:
            told["differ"].append(str(out))
        told["left"] += [path.name for path in out.parent.iterdir() if path.name != "out"]
        told["outputs"] += 1
    return told


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
