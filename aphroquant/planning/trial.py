"""One conversion of an excerpt in a process of its own, whose memory is then that of the conversion alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from aphroquant.conversion.manifest import request_arguments
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.request import ConversionRequest
from aphroquant.errors import AphroquantError, InputError


class Spent(NamedTuple):
    """On the clock, and of processors."""

    seconds: float
    cpu_seconds: float

    def less(self, other: Spent) -> Spent:
        return Spent(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)

    def plus(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def times(self, factor: float) -> Spent:
        return Spent(self.seconds * factor, self.cpu_seconds * factor)

    @classmethod
    def so_far(cls) -> Self:
        """Of this process; only differences mean something."""
        return cls(time.monotonic(), time.process_time())


NOTHING = Spent(0.0, 0.0)


class Trial(NamedTuple):
    """What one conversion took: `blocks` while it went from block to block, `block` for each of them but the first,
    which takes longer. `gpu_bytes` is 0 where no GPU was used."""

    whole: Spent
    blocks: Spent
    block: Spent
    peak_bytes: int
    gpu_bytes: int

    @property
    def rest(self) -> Spent:
        """Outside of the blocks."""
        return self.whole.less(self.blocks)


def try_conversion(requests: Sequence[ConversionRequest], source: Path, samples: int, out: Path) -> Trial:
    """Convert `source` as these ask, on so many windows and without training.

    InputError with what the conversion says if it fails.
    """
    told = [request_arguments(_smaller(request, source, samples)) for request in requests]
    content = json.dumps({"requests": told, "out": str(out), "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "aphroquant.planning.trial"]
    done = subprocess.run(command, input=content, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise InputError(f"a trial on a part of {source.name} failed: {lines[-1] if lines else done.returncode}")
    whole, blocks, block, peak_bytes, gpu_bytes = json.loads(done.stdout.splitlines()[-1])
    return Trial(Spent(*whole), Spent(*blocks), Spent(*block), peak_bytes, gpu_bytes)


def _smaller(request: ConversionRequest, source: Path, samples: int) -> ConversionRequest:
    """Rules for single layers are left out: they would decide for all of the excerpt's. So is a size of the whole."""
    rules = tuple(rule for rule in request.rules if "layers" not in rule.match)
    ignore = tuple(pattern for pattern in request.ignore if "layers" not in pattern)
    fewer = min(samples, request.samples)
    request = replace(request, source=str(source), samples=fewer, rules=rules, ignore=ignore)
    return replace(request, refine_steps=0, distill_steps=0, size=None)


class _Stopwatch(Progress):
    """Looks at the clock whenever a block is done, in every stage that counts the model's blocks."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._marks: list[list[Spent]] = [[]]

    def stage(self, text: str) -> None:
        self._marks.append([])

    def block(self, done: int, total: int) -> None:
        if total == self._num_layers and done == len(self._marks[-1]):
            self._marks[-1].append(Spent.so_far())

    @property
    def blocks(self) -> Spent:
        """All of them, of all stages."""
        whole = NOTHING
        for marks in self._complete():
            whole = whole.plus(marks[-1].less(marks[0]))
        return whole

    @property
    def block_later(self) -> Spent:
        """One of them: of all but the first, if there are others."""
        whole = NOTHING
        for marks in self._complete():
            first = 1 if self._num_layers > 1 else 0
            whole = whole.plus(marks[-1].less(marks[first]).times(1 / (self._num_layers - first)))
        return whole

    def _complete(self) -> list[list[Spent]]:
        return [marks for marks in self._marks if len(marks) == self._num_layers + 1]


def _run(content: dict[str, Any]) -> Trial:
    from pydantic import TypeAdapter

    from aphroquant.checkpoint import open_checkpoint
    from aphroquant.conversion.conversion import peak_memory
    from aphroquant.conversion.run import convert_all

    torch.set_num_threads(content["threads"])
    adapter, out = TypeAdapter(ConversionRequest), Path(content["out"])
    suffixes = [".gguf" if told["to"] == "gguf" else "" for told in content["requests"]]
    requests = [
        adapter.validate_python({**told, "out": out / f"{number}{suffix}"})
        for number, (told, suffix) in enumerate(zip(content["requests"], suffixes, strict=True))
    ]
    watch = _Stopwatch(open_checkpoint(requests[0].source).spec.num_layers)
    begun = Spent.so_far()
    convert_all(requests, progress=watch)
    whole = Spent.so_far().less(begun)
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Trial(whole, watch.blocks, watch.block_later, peak_memory(), on_gpu)


def main() -> int:
    """From a request on standard input to a line of figures on standard output."""
    try:
        print(json.dumps(_run(json.load(sys.stdin))))
    except AphroquantError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
