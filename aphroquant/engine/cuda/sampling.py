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
from aphroquant.kernels.cuda.host_copies import HostCopy, to_device
from aphroquant.kernels.cuda.sampling.tokens import sample_tokens


class DeviceSampling:
    """One token for each row of logits [R, V], begun at once. Later launches may overwrite the logits."""

    def __init__(self, logits: Tensor, samplers: Sequence[RequestSampler]) -> None:
        self._samplers = samplers
        draws = [sampler.device_draw() for sampler in samplers]
        self._others = [row for row, draw in enumerate(draws) if draw is None]
        self._rows = [row for row, draw in enumerate(draws) if draw is not None]
        rows = self._rows if self._others else None
        sampled = sample_tokens(logits, [draw for draw in draws if draw is not None], rows)
        self._tokens = HostCopy(sampled.tokens)
        self._logits: HostCopy | None = None
        if self._others:
            self._logits = HostCopy(logits[to_device(torch.tensor(self._others), logits.device)])
        self.on_device = None if self._others else sampled.next

    def result(self) -> list[Sampled | None]:
        """The tokens, when they are known; None for rows that are not numbers."""
        results: list[Sampled | None] = [None] * len(self._samplers)
        if self._logits is not None:
            for row, values in zip(self._others, self._logits.wait().numpy(), strict=True):
                results[row] = self._samplers[row].sample(values)
        for row, token in zip(self._rows, self._tokens.wait().tolist(), strict=True):
            results[row] = None if token < 0 else Sampled(token)
        return results
