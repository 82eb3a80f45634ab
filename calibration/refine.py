"""Refinement: codes, scales and gains of a block moved until its output is nearer to the source's, as AutoRound does.

Rounding layer by layer fits each layer's own output. Here all layers of a block are moved together, by gradients of the
squared error of the block's output, a few windows at a time. It starts from whatever rounding came before, so that
error feedback's work is kept, and ends with the best numbers seen on windows that no step was taken on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.training import Curvature, CurvatureEstimate, TrainedGain, TrainedWeight
from aphroquant.errors import InputError
from aphroquant.schemes import QuantizedWeight

BATCH_WINDOWS = 8
CODE_TRAVEL = 1.0  # codes, that a position may move in all steps together
CURVATURE_DRAWS = 8  # of random signs
SCALE_STEP = GAIN_STEP = 1e-3  # relative, at the beginning; all steps fall linearly to 0
_HELD_OUT = 16  # one window in so many is not trained on
_CHECKS = 4  # comparisons on them, evenly spread over the steps

Values = Mapping[str, Tensor]
# (weights by name, gains by name, windows) -> the block's output, and what it should be
Forward = Callable[[Values, Values, Sequence[int]], tuple[Tensor, Tensor]]


class Numbers(NamedTuple):
    """What a block is made of, as it would be stored."""

    weights: dict[str, QuantizedWeight]
    gains: dict[str, Tensor]


class Refined(NamedTuple):
    """The best numbers seen (None: those it began with) and the loss on held-out windows, before and after."""

    numbers: Numbers | None
    loss_before: float
    loss_after: float


def refine(
    weights: Mapping[str, TrainedWeight],
    gains: Mapping[str, TrainedGain],
    forward: Forward,
    num_windows: int,
    *,
    steps: int,
    seed: int,
) -> Refined:
    """Move the numbers by so many steps. InputError if the loss is not finite."""
    trained, held_out = split_windows(num_windows)
    best = before = _loss_of(_rounded(weights, gains), forward, held_out)
    if not torch.isfinite(torch.tensor(before)):
        raise InputError("the block's output on the calibration text is not finite")
    kept: Numbers | None = None
    curvatures = _curvatures(weights, gains, forward, trained, seed)
    checks = {steps * (check + 1) // _CHECKS for check in range(_CHECKS)}
    for step, batch in enumerate(batches(trained, steps, BATCH_WINDOWS, seed)):
        _step(weights, gains, forward, batch, curvatures, 1 - step / steps, steps)
        if step + 1 in checks:
            numbers = _rounded(weights, gains)
            now = _loss_of(numbers, forward, held_out)
            if now < best:
                best, kept = now, numbers
    return Refined(kept, before, best)


def split_windows(num_windows: int) -> tuple[list[int], list[int]]:
    """(windows to train on, windows to judge by): disjoint, unless there are too few."""
    held_out = list(range(_HELD_OUT // 2, num_windows, _HELD_OUT))
    if not held_out:
        return list(range(num_windows)), list(range(num_windows))
    return [window for window in range(num_windows) if window not in set(held_out)], held_out


def batches(windows: Sequence[int], count: int, size: int, seed: int) -> Iterator[list[int]]:
    """`count` batches of at most `size` windows, each window once before any comes again."""
    random = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(count):
        if not left:
            left = [windows[index] for index in torch.randperm(len(windows), generator=random).tolist()]
        yield left[:size]
        left = left[size:]


def _curvatures(
    weights: Mapping[str, TrainedWeight],
    gains: Mapping[str, TrainedGain],
    forward: Forward,
    windows: Sequence[int],
    seed: int,
) -> dict[str, Curvature]:
    """How the loss bends along each weight, where it is before any step."""
    random = torch.Generator().manual_seed(seed)
    estimates = {name: CurvatureEstimate() for name in weights}
    num_terms = 0
    gain_values = {name: gain.value().detach() for name, gain in gains.items()}
    for batch in batches(windows, CURVATURE_DRAWS, BATCH_WINDOWS, seed):
        values = {name: weight.value() for name, weight in weights.items()}
        with torch.enable_grad():
            output, _ = forward(values, gain_values, batch)
        signs = torch.randint(0, 2, output.shape, generator=random, dtype=torch.int8).mul_(2).sub_(1)
        output.backward(signs.to(output.device, output.dtype))  # type: ignore[no-untyped-call]
        num_terms += output.numel()
        for name, value in values.items():
            assert value.grad is not None
            estimates[name].add(value.grad)
    return {name: estimate.finish(num_terms) for name, estimate in estimates.items()}


def _step(
    weights: Mapping[str, TrainedWeight],
    gains: Mapping[str, TrainedGain],
    forward: Forward,
    batch: Sequence[int],
    curvatures: Mapping[str, Curvature],
    share: float,
    steps: int,
) -> None:
    values = {name: weight.value() for name, weight in weights.items()}
    gain_values = {name: gain.value() for name, gain in gains.items()}
    with torch.enable_grad():
        output, expected = forward(values, gain_values, batch)
        (output - expected).square().mean().backward()  # type: ignore[no-untyped-call]
    for name, weight in weights.items():
        gradient = values.pop(name).grad
        assert gradient is not None
        weight.step(gradient, SCALE_STEP * share)
        weight.step_codes(gradient, curvatures[name], 2 * CODE_TRAVEL / steps * share)
    for name, gain in gains.items():
        gradient = gain_values[name].grad
        assert gradient is not None
        gain.step(gradient, GAIN_STEP * share)


def _rounded(weights: Mapping[str, TrainedWeight], gains: Mapping[str, TrainedGain]) -> Numbers:
    return Numbers(
        {name: weight.rounded() for name, weight in weights.items()},
        {name: gain.rounded() for name, gain in gains.items()},
    )


@torch.no_grad()
def _loss_of(numbers: Numbers, forward: Forward, windows: Sequence[int]) -> float:
    """Mean squared error over windows, a batch at a time."""
    weights = {name: weight.dequantize() for name, weight in numbers.weights.items()}
    gains = {name: gain.float() for name, gain in numbers.gains.items()}
    parts = [windows[start : start + BATCH_WINDOWS] for start in range(0, len(windows), BATCH_WINDOWS)]
    total = 0.0
    for part in parts:
        output, expected = forward(weights, gains, part)
        total += float((output - expected).square().mean()) * len(part)
    return total / len(windows)
