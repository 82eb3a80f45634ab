"""Distillation: scales and gains of a whole quantized model moved until its logits are nearer to the source's.

Rounding and refinement see one block at a time; the divergence of the logits sees all of them, so that later blocks may
make up for what earlier ones lost. Codes stay as they are: what moves is one number a group and the norms' gains, too
few to learn the calibration text by heart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_STEP = 1e-3  # relative, of scales and gains at the height of the steps
CHECKS = 8  # comparisons on held-out windows, evenly spread over the steps
_WARM_UP_STEPS = 10
_LOGIT_ELEMENTS = 1 << 26  # of logits that exist at once


class OutputGradient(NamedTuple):
    """Mean divergence over positions, and its gradients by the hidden states [T, H] and by the final gain [H]."""

    divergence: float
    by_hidden: Tensor
    by_gain: Tensor


Logits = Callable[[Tensor, Tensor], Tensor]  # hidden states [T, H], final gain [H] -> [T, V]


def step_share(step: int, steps: int) -> float:
    """What part of the full step size a step has: rising at first, then falling to 0 as a cosine does."""
    return min(1.0, (step + 1) / _WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def divergence(source: Tensor, model: Tensor) -> Tensor:
    """KL(source || model) of logits [T, V] in nats, [T]."""
    expected = source.log_softmax(-1)
    return (expected.exp() * (expected - model.log_softmax(-1))).sum(-1)


def output_gradient(
    hidden: Tensor, gain: Tensor, source_hidden: Tensor, source_gain: Tensor, logits: Logits, vocab_size: int
) -> OutputGradient:
    """The divergence of the logits, a few positions at a time: all logits of a batch would be gigabytes."""
    hidden, gain = hidden.detach().requires_grad_(), gain.detach().requires_grad_()
    total = 0.0
    for rows in logit_rows(hidden.shape[0], vocab_size):
        with torch.no_grad():
            expected = logits(source_hidden[rows], source_gain)
        with torch.enable_grad():
            part = divergence(expected, logits(hidden[rows], gain)).sum() / hidden.shape[0]
            part.backward()  # type: ignore[no-untyped-call]
        total += float(part.detach())
    assert hidden.grad is not None
    assert gain.grad is not None
    return OutputGradient(total, hidden.grad, gain.grad)


def logit_rows(num_rows: int, vocab_size: int) -> list[slice]:
    """Slices of as many rows as may have their logits at once."""
    step = max(1, _LOGIT_ELEMENTS // vocab_size)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
