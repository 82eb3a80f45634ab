"""One pass over the windows: the base and every candidate, block by block, then their logits side by side.

Models are streamed one after the other, and only their last hidden states are kept. Logits exist for a few hundred
positions at a time: [windows, window_len, vocabulary] would be gigabytes. The noise floor and the worst positions come
from the same states, so that they cost no second reading of any weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.checkpoint import Checkpoint
from aphroquant.errors import InputError
from aphroquant.evaluation.noise import FLOOR_DTYPE, floor_batch, floor_rows
from aphroquant.evaluation.positions import Positions, compare_several
from aphroquant.evaluation.worst import WorstRows, worst_rows
from aphroquant.kernels.reference.linear import ReferenceLinear
from aphroquant.models.decoder import Linear
from aphroquant.models.streamed import CPU, Batch, StreamedModel
from aphroquant.schemes import QuantizedWeight

LOGIT_ROWS = 256  # positions whose logits of all models exist at once
OnProgress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


class Measured(NamedTuple):
    """Positions and worst rows of each candidate; of the rounded base too, if asked for, over `floor_windows`."""

    positions: list[Positions]
    worst: list[WorstRows]
    floor: Positions | None
    floor_windows: int


class _Rows(NamedTuple):
    """A model and its final hidden states [T, H] of every scored position."""

    model: StreamedModel
    hidden: Tensor

    def logits(self, rows: slice | Tensor, vocab_size: int) -> Tensor:
        return self.model.logits(self.hidden[rows])[:, :vocab_size]


def stage_names(num_models: int) -> list[str]:
    """What progress calls the passes over so many candidates."""
    return ["model"] if num_models == 1 else [f"model {number}" for number in range(1, num_models + 1)]


def measure(
    base: Checkpoint,
    candidates: Sequence[Checkpoint],
    batch: Tensor,
    vocab_size: int,
    on_progress: OnProgress | None = None,
    *,
    device: torch.device = CPU,
    with_floor: bool = False,
) -> Measured:
    """Positions of token windows [W, S], all but the last of each: W * (S - 1) entries."""
    progress = on_progress or (lambda what, done, total: None)
    targets = batch[:, 1:].flatten()
    batches = [Batch(batch), *([Batch(floor_batch(batch), FLOOR_DTYPE)] if with_floor else [])]
    reference, *rounded = _states(base, batches, partial(progress, "base"), device)
    models = []
    for stage, candidate in zip(stage_names(len(candidates)), candidates, strict=True):
        models += _states(candidate, batches[:1], partial(progress, stage), device)
    positions = _compare(reference, models, targets, vocab_size, partial(progress, "logits"))
    _check_base(base, positions[0])
    floor = None
    if rounded:
        rows = floor_rows(batch)
        floor = _compare(_Rows(reference.model, reference.hidden[rows]), rounded, targets[rows], vocab_size)[0]
    worst = []
    for model, found in zip(models, positions, strict=True):
        rows = worst_rows(found)
        worst.append(WorstRows(rows, reference.logits(rows, vocab_size).cpu(), model.logits(rows, vocab_size).cpu()))
    return Measured(positions, worst, floor, len(batches[-1].windows))


def _states(
    checkpoint: Checkpoint, batches: Sequence[Batch], on_block: Callable[[int, int], None], device: torch.device
) -> list[_Rows]:
    """Hidden states of every batch, each without its windows' last position, which nothing follows."""
    model = StreamedModel(checkpoint, make_linear=reference_linear, device=device)
    states = model.hidden_states_of(batches, on_block)
    return [_Rows(model, hidden[:, :-1].flatten(0, 1)) for hidden in states]


def _compare(
    base: _Rows,
    models: Sequence[_Rows],
    targets: Tensor,
    vocab_size: int,
    on_rows: Callable[[int, int], None] | None = None,
) -> list[Positions]:
    """The positions of each model."""
    parts: list[list[Positions]] = [[] for _ in models]
    for start in range(0, len(targets), LOGIT_ROWS):
        chunk = slice(start, start + LOGIT_ROWS)
        logits = [model.logits(chunk, vocab_size) for model in (base, *models)]
        found = compare_several(logits[0], logits[1:], targets[chunk].to(logits[0].device))
        for collected, part in zip(parts, found, strict=True):
            collected.append(part.cpu())
        if on_rows is not None:
            on_rows(min(start + LOGIT_ROWS, len(targets)), len(targets))
    return [Positions.concatenate(collected) for collected in parts]


def _check_base(base: Checkpoint, positions: Positions) -> None:
    broken = int((~positions.base_finite).sum())
    if broken:
        raise InputError(
            f"{base.source}: the base's logits are not finite at {broken} of {len(positions.kld)} positions"
        )


def reference_linear(name: str, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
    """Float32 arithmetic by definition of the scheme: inputs are rounded where it says that they are quantized."""
    return ReferenceLinear(weight, bias)
