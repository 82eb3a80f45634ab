"""Statistics of the inputs of linear layers, gathered chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.gram import gram
from aphroquant.errors import InputError


class InputStatistics(NamedTuple):
    """What is known of an input x of width K over `num_tokens` tokens.

    `second_moment` is E[x x^T] float32 [K, K] (None if it was not asked for), `mean_square` its diagonal, E[x**2];
    `mean_abs` E|x| and `max_abs` the greatest |x|, both [K].
    """

    num_tokens: int
    mean_square: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    second_moment: Tensor | None = None

    @property
    def dead_channels(self) -> int:
        """Channels that were zero for every token."""
        return int((self.max_abs == 0).sum())


class StatisticsCollector:
    """Sums over chunks of one layer's input. `module` is what errors name; `window_len` turns rows into samples."""

    def __init__(
        self,
        module: str,
        width: int,
        window_len: int,
        *,
        second_moment: bool,
        device: torch.device | None = None,
        first_token: int = 0,
    ) -> None:
        """`device`: where the inputs are, and the statistics will be. `first_token`: what came before, of others."""
        self._module = module
        self._window_len = window_len
        self._first_token = first_token
        self._num_tokens = 0
        self._abs_sum = torch.zeros(width, device=device)
        self._square_sum = torch.zeros(width, device=device)
        self._max_abs = torch.zeros(width, device=device)
        self._moment_sum = torch.zeros(width, width, device=device) if second_moment else None

    def update(self, x: Tensor) -> None:
        """Add the rows of x [T, K]. InputError naming module and sample if one is not finite."""
        magnitudes = x.float().abs()
        abs_sum = magnitudes.sum(0)
        if not torch.isfinite(abs_sum).all():
            self._report_bad_row(x)
        self._abs_sum += abs_sum
        torch.maximum(self._max_abs, magnitudes.amax(0), out=self._max_abs)
        if self._moment_sum is not None:
            self._moment_sum += gram(x.float())
        else:
            self._square_sum += magnitudes.square_().sum(0)
        self._num_tokens += x.shape[0]

    def sums(self) -> list[Tensor]:
        """What is known so far, to be added to another collector: the tensors themselves."""
        found = [self._abs_sum, self._square_sum, self._max_abs]
        return found if self._moment_sum is None else [*found, self._moment_sum]

    def add(self, num_tokens: int, sums: Sequence[Tensor]) -> None:
        """The `sums` of another collector, which has seen other tokens."""
        for own, other in zip(self.sums(), sums, strict=True):
            if own is self._max_abs:
                torch.maximum(own, other, out=own)
            else:
                own += other
        self._num_tokens += num_tokens

    def finish(self) -> InputStatistics:
        """The statistics of everything seen; to be called once, at the end."""
        tokens = max(self._num_tokens, 1)
        moment = None if self._moment_sum is None else self._moment_sum.div_(tokens)
        square = self._square_sum / tokens if moment is None else moment.diagonal().clone()
        return InputStatistics(self._num_tokens, square, self._abs_sum / tokens, self._max_abs, moment)

    def _report_bad_row(self, x: Tensor) -> None:
        bad = int((~torch.isfinite(x)).any(1).nonzero()[0]) + self._num_tokens + self._first_token
        sample, position = divmod(bad, self._window_len)
        raise InputError(
            f"{self._module}: its input is not finite in calibration sample {sample}, position {position}",
            hint="the source weights may be damaged: look for NaN or infinite values with aphroquant inspect",
        )
