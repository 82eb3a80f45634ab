"""How long a conversion will last and what memory it will take, from trials on its first blocks.

Work on a block is a part that does not depend on the text (factors, rounding, writing) and one that grows with it
(forward passes, statistics). One block on few windows, one on more, and two on few tell both, and what comes but once;
layers and windows are then counted. Memory does not grow with the layers, only with the windows.

What is counted is processor time, which another program on the machine hardly changes; how much time on the clock
that is, is the same for all trials together as for the whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.request import ConversionRequest
from aphroquant.planning.excerpt import write_excerpt
from aphroquant.planning.trial import Trial, try_conversion

_FEW_TOKENS, _MORE_TOKENS = 4096, 12288  # below the first, temporary memory still grows with the text


@dataclass(frozen=True)
class Estimate:
    """Of the whole conversion. `seconds` are those of this machine as busy as it is now, on which `cpu_seconds` hardly
    depend. `gpu_bytes` is 0 where no GPU is used; `trials` are what it follows from; `left_out` says what is not in it.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    gpu_bytes: int
    trials: tuple[Trial, ...]
    left_out: str = ""


def estimate(
    checkpoint: Checkpoint, requests: Sequence[ConversionRequest], *, calibrates: bool, work: Path | None = None
) -> Estimate:
    """Try the first one or two blocks, in a temporary directory in `work`."""
    growth, num_layers = _growth(requests[0], calibrates), checkpoint.spec.num_layers
    with tempfile.TemporaryDirectory(prefix="aphroquant-plan-", dir=work) as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        write_excerpt(checkpoint, 1, one)
        write_excerpt(checkpoint, min(2, num_layers), two)
        first = try_conversion(requests, one, growth.few, Path(folder) / "1")
        deeper = try_conversion(requests, two, growth.few, Path(folder) / "2") if num_layers > 1 else first
        longer = try_conversion(requests, one, growth.more, Path(folder) / "3") if growth.more > growth.few else first

    trials = first, deeper, longer
    cpu = _of_all_layers(growth, num_layers, *(trial.cpu_seconds for trial in trials))
    pace = sum(trial.seconds for trial in trials) / sum(trial.cpu_seconds for trial in trials)
    on_gpu = max(first.gpu_bytes, deeper.gpu_bytes) + growth.added(first.gpu_bytes, longer.gpu_bytes)
    return Estimate(
        seconds=cpu * pace,
        cpu_seconds=cpu,
        peak_bytes=int(max(first.peak_bytes, deeper.peak_bytes) + growth.added(first.peak_bytes, longer.peak_bytes)),
        gpu_bytes=int(on_gpu),
        trials=trials,
        left_out=_left_out(requests),
    )


def _of_all_layers(growth: _Growth, num_layers: int, one: float, two: float, more: float) -> float:
    """From what one block, two, and one on more windows take."""
    block = max(0.0, two - one)
    return max(0.0, one - block) + num_layers * (block + growth.added(one, more))


class _Growth(NamedTuple):
    """Numbers of windows: of the smaller trials, of the larger one, of the conversion."""

    few: int
    more: int
    all: int

    def added(self, few: float, more: float) -> float:
        """What all windows add to what few of them take, from what more of them take."""
        if self.more <= self.few:
            return 0.0
        return max(0.0, more - few) / (self.more - self.few) * (self.all - self.few)


def _growth(request: ConversionRequest, calibrates: bool) -> _Growth:
    windows = request.samples if calibrates else 0
    few = min(windows, max(1, _FEW_TOKENS // request.seq_len))
    return _Growth(few, min(windows, max(few + 1, _MORE_TOKENS // request.seq_len)), windows)


def _left_out(requests: Sequence[ConversionRequest]) -> str:
    from aphroquant.calibration.effort import find_effort

    for request in requests:
        effort = find_effort(request.effort)
        steps = (request.refine_steps, effort.refine_steps), (request.distill_steps, effort.distill_steps)
        if any(given or (given is None and default) for given, default in steps):
            return "steps of training, which are not tried"
    return ""
