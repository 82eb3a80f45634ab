"""From a budget to rules: damages estimated, choices made exactly, then measured and made better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.allocation import Choice, Improved, Option, allocate, cost_of, damage_of, improve
from aphroquant.calibration.data import CalibrationData, calibration_windows
from aphroquant.calibration.effort import find_effort
from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.base import naming
from aphroquant.conversion.allocation.divergence import MeasuredDivergence
from aphroquant.conversion.allocation.pieces import PieceStore
from aphroquant.conversion.allocation.problem import Item, Problem, make_problem
from aphroquant.conversion.allocation.sensitivity import Sensitivity, guessed_damages, item_damages
from aphroquant.conversion.job.choices import ChoiceKeeper
from aphroquant.conversion.job.fingerprint import of_choice
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.request import ConversionRequest
from aphroquant.devices import torch_device
from aphroquant.errors import UsageError

_ROUNDED_BY, _JUDGED_BY, _MEASURED_ON = 16, 8, 8  # windows; the last are others than the first two
_LEAST_WINDOWS = 2

Options = list[list[Option]]


class Allocation(NamedTuple):
    """The request with a rule for every layer that there was a choice for, and what the report says of it."""

    request: ConversionRequest
    report: dict[str, Any]


def choose_widths(
    checkpoint: Checkpoint,
    request: ConversionRequest,
    progress: Progress,
    *,
    measures: bool = True,
    keeper: ChoiceKeeper | None = None,
) -> Allocation:
    """The best widths for the request's budget. Without `measures` only a guess, which takes no time.

    `keeper` may have them from an earlier attempt at the same, and gets them otherwise.
    UsageError for a budget that cannot be met, or a target that holds one width only."""
    problem = make_problem(checkpoint, request)
    if not measures:
        options = _options(problem, guessed_damages(problem))
        choice = allocate(options, problem.budget)
        return _allocation(problem, options, choice, {"guessed": True})
    keeper = keeper or ChoiceKeeper()
    data, device = _text(checkpoint, request), torch_device(request.device)
    decided_by = of_choice(request, checkpoint, data, device)
    kept = keeper.take(decided_by)
    if kept is not None:
        progress.note("the bits of each layer were chosen already, and are taken from the job")
        return Allocation(_ruled(problem, tuple(kept["choice"])), kept["report"])
    found, choice = _measured(problem, checkpoint, data.windows, device, progress)
    keeper.keep(decided_by, {"choice": list(choice), "report": found.report})
    return found


def _measured(
    problem: Problem, checkpoint: Checkpoint, windows: Tensor, device: torch.device, progress: Progress
) -> tuple[Allocation, Choice]:
    request = problem.request
    effort = find_effort(request.effort)
    rounded_by, measured_on = _split(windows)
    with closing(PieceStore()) as pieces, naming(checkpoint.path):
        progress.stage("estimating what each layer's bits are worth")
        passes = Sensitivity(problem, checkpoint, pieces, device, progress)
        # Second moments of all experts of a block would not fit into memory.
        quick = effort.allocation_tries == 0 or checkpoint.spec.experts is not None
        damages = passes.damages(rounded_by, min(_JUDGED_BY, len(rounded_by)), request.seed, quick=quick)
        options = _options(problem, item_damages(problem, damages))
        if effort.allocation_tries == 0:
            choice = allocate(options, problem.budget)
            return _allocation(problem, options, choice, {}), choice
        found = _improved(problem, options, pieces, checkpoint, measured_on, device, progress, effort.allocation_tries)
    measured = {"measured_kld": found.after, "measured_kld_before": found.before, "measured": found.measured}
    return _allocation(problem, options, found.choice, measured), found.choice


def _improved(
    problem: Problem,
    options: Options,
    pieces: PieceStore,
    checkpoint: Checkpoint,
    windows: Tensor,
    device: torch.device,
    progress: Progress,
    tries: int,
) -> Improved:
    progress.stage("measuring choices of bits")
    progress.block(0, tries + 1)
    judge = MeasuredDivergence(checkpoint, windows, pieces, device)
    done = 0

    def measure(choice: Choice) -> float:
        nonlocal done
        value = judge.of(chosen_widths(problem.items, choice))
        done += 1
        progress.block(done, tries + 1)
        return value

    kinds = [item.kind for item in problem.items]
    return improve(options, problem.budget, measure, tries=tries, seed=problem.request.seed, kinds=kinds)


def chosen_widths(items: Sequence[Item], choice: Choice) -> dict[str, int]:
    """The place of each module's width."""
    return {module: item.widths[number] for item, number in zip(items, choice, strict=True) for module in item.modules}


def _options(problem: Problem, damages: list[list[float]]) -> Options:
    return [
        [Option(cost, damage) for cost, damage in zip(problem.costs(item), own, strict=True)]
        for item, own in zip(problem.items, damages, strict=True)
    ]


def _text(checkpoint: Checkpoint, request: ConversionRequest) -> CalibrationData:
    if request.samples < _LEAST_WINDOWS:
        raise UsageError(
            f"choosing bits needs calibration text, but samples = {request.samples}", hint=f"--samples {_LEAST_WINDOWS}"
        )
    return calibration_windows(
        checkpoint.tokenizer(),
        request.calibration,
        samples=request.samples,
        seq_len=request.seq_len,
        seed=request.seed,
        weights=request.weights,
        packing=request.packing,
        chat_template=request.chat_template,
    )


def _split(windows: Tensor) -> tuple[Tensor, Tensor]:
    """(what layers are rounded and judged by, what choices are measured on): evenly spread, and disjoint."""
    count = min(_MEASURED_ON, len(windows) // 2)
    held_out = {(2 * number + 1) * len(windows) // (2 * count) for number in range(count)}
    others = [number for number in range(len(windows)) if number not in held_out]
    wanted = min(_ROUNDED_BY, len(others))
    chosen = [others[number * len(others) // wanted] for number in range(wanted)]
    chosen = chosen[::2] + chosen[1::2]  # so that the first ones, which layers are judged by, are spread as well
    return windows[torch.tensor(chosen)], windows[torch.tensor(sorted(held_out))]


def _allocation(problem: Problem, options: Options, choice: Choice, measured: dict[str, Any]) -> Allocation:
    widths = chosen_widths(problem.items, choice)
    used = cost_of(options, choice)
    counts = Counter(problem.widths[place].label for place in widths.values())
    report = {
        "budget_bytes": problem.budget + problem.fixed,
        "used_bytes": used + problem.fixed,
        "bits_per_weight": problem.bits(used),
        "predicted_kld": None if "guessed" in measured else damage_of(options, choice),
        **measured,
        "widths": dict(sorted(counts.items())),
        "modules": {module: problem.widths[place].label for module, place in widths.items()},
    }
    return Allocation(_ruled(problem, choice), report)


def _ruled(problem: Problem, choice: Choice) -> ConversionRequest:
    """The request with the choice as rules, in place of a budget."""
    rules = (*problem.request.rules, *problem.rules(choice))
    return replace(problem.request, bits=None, size=None, rules=rules)
