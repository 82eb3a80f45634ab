"""How long a conversion will last and what memory it will take, from trials on its first blocks.

Work on a block is a part that does not depend on the text (factors, rounding, writing) and one that grows with it
(forward passes, statistics). Where a conversion goes from block to block, each trial tells what one takes, without what
comes but once: one on few windows and one on more tell both parts. What is done elsewhere (GGUF's encoders, repacking)
follows from excerpts of one block and of more. Layers and windows are then counted. Memory does not grow with the
layers, only with the windows.

What is counted is processor time, which another program on the machine hardly changes; how much time on the clock that
is, in the blocks and outside of them, is the same for the trials as for the whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.request import ConversionRequest
from aphroquant.planning.excerpt import write_excerpt
from aphroquant.planning.trial import Spent, Trial, try_conversion

_FEW_TOKENS, _MORE_TOKENS = 4096, 12288  # below the first, temporary memory still grows with the text
_MOST_BLOCKS, _FEW_BYTES = 9, 2**30  # of an excerpt for conversions without calibration


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
    """Try the first blocks, in a temporary directory in `work`."""
    growth, num_layers = _growth(requests[0], calibrates), checkpoint.spec.num_layers
    depth = min(num_layers, 2 if calibrates else _depth(checkpoint))
    with tempfile.TemporaryDirectory(prefix="aphroquant-plan-", dir=work) as folder:
        one, more = Path(folder) / "one", Path(folder) / "more"
        write_excerpt(checkpoint, 1, one)
        write_excerpt(checkpoint, depth, more)
        first = try_conversion(requests, one, growth.few, Path(folder) / "1")
        deeper = try_conversion(requests, more, growth.few, Path(folder) / "2") if depth > 1 else first
        longer = try_conversion(requests, more, growth.more, Path(folder) / "3") if growth.more > growth.few else deeper

    trials = first, deeper, longer
    rest = _rest(first, deeper, depth, num_layers)
    blocks = _blocks(deeper, longer, growth, depth, num_layers)
    on_gpu = max(first.gpu_bytes, deeper.gpu_bytes) + growth.added(deeper.gpu_bytes, longer.gpu_bytes)
    return Estimate(
        seconds=rest * _pace(trial.rest for trial in trials) + blocks * _pace((deeper.block, longer.block)),
        cpu_seconds=rest + blocks,
        peak_bytes=int(max(first.peak_bytes, deeper.peak_bytes) + growth.added(deeper.peak_bytes, longer.peak_bytes)),
        gpu_bytes=int(on_gpu),
        trials=trials,
        left_out=_left_out(requests),
    )


def _depth(checkpoint: Checkpoint) -> int:
    """Blocks of a trial that is over soon: so many that their time shows beside that of starting."""
    return max(2, min(_MOST_BLOCKS, _FEW_BYTES * checkpoint.spec.num_layers // max(1, checkpoint.num_bytes)))


def _rest(first: Trial, deeper: Trial, depth: int, num_layers: int) -> float:
    """Processor time outside of the blocks: what comes but once, and what each layer adds."""
    one, more = first.rest.cpu_seconds, deeper.rest.cpu_seconds
    each = max(0.0, more - one) / (depth - 1) if depth > 1 else 0.0
    return min(one, more) + (num_layers - 1) * each  # a cold start takes longer than the next ones


def _blocks(deeper: Trial, longer: Trial, growth: _Growth, depth: int, num_layers: int) -> float:
    """Processor time of going through all blocks on all windows."""
    few, more = deeper.block.cpu_seconds, longer.block.cpu_seconds
    extra = max(0.0, deeper.blocks.cpu_seconds - depth * few)  # of the first block
    return extra + num_layers * (few + growth.added(few, more))


def _pace(spent: Iterable[Spent]) -> float:
    """Time on the clock for each second of processors."""
    seconds, cpu_seconds = map(sum, zip(*spent, strict=True))
    return seconds / cpu_seconds if cpu_seconds > 0 else 1.0


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
