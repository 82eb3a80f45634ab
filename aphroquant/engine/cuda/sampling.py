"""Choosing tokens on the device: greedy, and draws within temperature, min-p, top-k and top-p, all rows in one launch.

What else a request may ask for (penalties, logprobs, minimum lengths, ...) runs in the samplers of the host, on copies
of those rows alone. A draw takes its uniform number from the request's own generator and finds it in the cumulative
distribution over ascending token ids, as the host does: a seed gives the same tokens on either, but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.engine.sampling import RequestSampler, Sampled
from aphroquant.kernels.cuda.sampling.tokens import sample_tokens


def sample_on_device(logits: Tensor, samplers: Sequence[RequestSampler]) -> list[Sampled | None]:
    """One token for each row of logits [R, V]; None where they are not numbers."""
    draws = [sampler.device_draw() for sampler in samplers]
    others = [row for row, draw in enumerate(draws) if draw is None]
    rows = [row for row, draw in enumerate(draws) if draw is not None] if others else None
    tokens = sample_tokens(logits, [draw for draw in draws if draw is not None], rows)
    results: list[Sampled | None] = [None] * len(samplers)
    if others:
        copied = logits[torch.tensor(others, device=logits.device)].cpu().numpy()
        for row, values in zip(others, copied, strict=True):
            results[row] = samplers[row].sample(values)
    for row, token in zip(range(len(samplers)) if rows is None else rows, tokens.tolist(), strict=True):
        results[row] = None if token < 0 else Sampled(token)
    return results
