"""Choosing tokens on the device: greedy, and draws within temperature, min-p, top-k and top-p, all rows at once.

What else a request may ask for (penalties, logprobs, minimum lengths, ...) runs in the samplers of the host, on copies
of those rows alone. A draw takes its uniform number from the request's own generator and finds it in the cumulative
distribution over ascending token ids, as the host does: a seed gives the same tokens on either, but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.engine.sampling import RequestSampler, Sampled
from aphroquant.engine.sampling.sampler import DeviceDraw


def sample_on_device(logits: Tensor, samplers: Sequence[RequestSampler]) -> list[Sampled | None]:
    """One token for each row of logits [R, V]; None where they are not numbers."""
    draws = [sampler.device_draw() for sampler in samplers]
    plain = [row for row, draw in enumerate(draws) if draw is not None]
    others = [row for row, draw in enumerate(draws) if draw is None]
    results: list[Sampled | None] = [None] * len(samplers)
    if plain:
        rows = logits if not others else logits[torch.tensor(plain, device=logits.device)]
        for row, token in zip(plain, choose(rows, [draw for draw in draws if draw is not None]), strict=True):
            results[row] = None if token < 0 else Sampled(token)
    if others:
        copied = logits[torch.tensor(others, device=logits.device)].cpu().numpy()
        for row, values in zip(others, copied, strict=True):
            results[row] = samplers[row].sample(values)
    return results


def choose(logits: Tensor, draws: Sequence[DeviceDraw]) -> list[int]:
    """A token for each row [R, V], -1 where its largest logit is not finite."""
    peaks, tokens = logits.max(dim=-1)  # NaN counts as the maximum
    tokens = torch.where(peaks.isfinite(), tokens, -1)
    random = [row for row, draw in enumerate(draws) if not draw.is_greedy]
    if random:
        rows = torch.tensor(random, device=logits.device)
        drawn = _draw(logits[rows], peaks[rows], [draws[row] for row in random])
        tokens[rows] = torch.where(tokens[rows] < 0, -1, drawn)
    chosen: list[int] = tokens.tolist()
    return chosen


def _draw(logits: Tensor, peaks: Tensor, draws: Sequence[DeviceDraw]) -> Tensor:
    """int64 [R]. Truncated tokens get weight 0; of equal logits at an edge the lower ids stay."""
    device, vocab_size = logits.device, logits.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    scaled = (logits - peaks[:, None]) / column([draw.temperature for draw in draws])  # at most 0
    weights = scaled.exp()
    if any(draw.min_p > 0 for draw in draws):
        weights = torch.where(weights >= column([draw.min_p for draw in draws]), weights, 0)
    if any(draw.top_k > 0 or draw.top_p < 1 for draw in draws):
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(vocab_size, device=device)
        top_k = torch.tensor([draw.top_k or vocab_size for draw in draws], device=device)[:, None]
        ordered = torch.where(ranks < top_k, ordered, 0)
        mass = ordered.double().cumsum(-1)
        before = mass - ordered  # what the likelier tokens have already
        ordered = torch.where(before < column([draw.top_p for draw in draws]) * mass[:, -1:], ordered, 0)
        weights = torch.zeros_like(weights).scatter_(-1, order, ordered)
    cumulative = weights.double().cumsum(-1)
    positions = column([draw.position for draw in draws]).double() * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, positions, right=True)[:, 0]
    last = vocab_size - 1 - (weights.flip(-1) > 0).int().argmax(-1)  # rounding can put a position at the very end
    return torch.minimum(found, last)
