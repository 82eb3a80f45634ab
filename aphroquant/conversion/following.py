"""Following the source: its states in front of every layer, beside those of the quantized model, for some windows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from aphroquant.calibration.drift import Drift
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.conversion.activations import Activations, chunks
from aphroquant.conversion.calibration_block import CalibrationBlock
from aphroquant.conversion.team.team import ALONE, Team, groups
from aphroquant.models.spec import INPUT_NORM, POST_ATTENTION_NORM

FOLLOWED_TOKENS = 1 << 13  # of evenly spread windows


class SourceFollower:
    """Corrects the weights of `modules` half a block at a time, each before it is rounded.

    The source's layers are those of the block before correction and rounding: scaled channels make no difference.
    """

    def __init__(
        self,
        hidden: Activations,
        window_len: int,
        modules: Collection[str],
        memory_limit: int,
        device: torch.device,
        team: Team = ALONE,
    ) -> None:
        """`hidden` are the embedded windows, which both models share. Every worker of the team follows all of them."""
        self._team, self._groups = team, groups(len(hidden), window_len)
        self._window_len, self._modules, self._device = window_len, modules, device
        num_windows = len(hidden) // window_len
        count = min(num_windows, max(1, FOLLOWED_TOKENS // window_len))
        starts = torch.arange(count) * num_windows // max(count, 1) * window_len
        self._rows = (starts[:, None] + torch.arange(window_len)).reshape(-1)
        self._states = Activations(len(self._rows), hidden.rows.shape[1], memory_limit=memory_limit, device=device)
        for own in self._chunks():
            self._states.rows[own] = self._taken(hidden.rows, own).to(self._states.rows.device)
        self._exact: CalibrationBlock | None = None

    @property
    def states(self) -> Tensor:
        """The source's, of the followed windows."""
        return self._states.rows

    def correct_first(
        self,
        block: CalibrationBlock,
        norm: str,
        names: Sequence[str],
        statistics: InputStatistics | None,
        states: Tensor,
    ) -> None:
        """The layers that read a norm. `states` [T, H] are the quantized model's in front of it."""
        self._exact = block.copy()
        if self._corrects(block, names, statistics):
            drift = Drift()
            for own in self._chunks():
                source, now = self._source(own), self._taken(states, own)
                x = block.block.norm(norm, now)
                drift.add(block.block.norm(norm, source) - x, x)
            chosen = [block.linears[name] for name in names if f"{block.prefix}.{name}" in self._modules]
            corrected = drift.by_inputs([linear.weight for linear in chosen], _moment(statistics))
            for linear, weight in zip(chosen, corrected, strict=True):
                linear.weight = weight

    def correct_last(
        self,
        block: CalibrationBlock,
        norm: str,
        name: str,
        statistics: InputStatistics | None,
        states: Tensor,
        inner: Tensor,
    ) -> None:
        """The layer that writes to the states, with its inputs `inner` [T, K]; the source's states go on behind it."""
        assert self._exact is not None
        exact, self._exact = self._exact, None
        forward = exact.attention_mix if norm == INPUT_NORM else exact.mlp_inner
        corrects, drift = self._corrects(block, (name,), statistics), Drift()
        for own in self._chunks():
            source = self._source(own)
            source = source + exact.linears[name](forward(exact.block.norm(norm, source)))
            if corrects:
                x = self._taken(inner, own)
                drift.add(source - self._taken(states, own) - exact.linears[name](x), x)
            self._states.rows[own] = source.to(self._states.rows.device)
        if corrects:
            linear = block.linears[name]
            linear.weight = drift.by_outputs(linear.weight, _moment(statistics))

    def pass_experts(self, block: CalibrationBlock) -> None:
        """Go on behind experts, which are not corrected, before they are rounded."""
        for own in self._chunks():
            source = self._source(own)
            output = source + block.block.mlp(block.block.norm(POST_ATTENTION_NORM, source))
            self._states.rows[own] = output.to(self._states.rows.device)

    def _corrects(self, block: CalibrationBlock, names: Sequence[str], statistics: InputStatistics | None) -> bool:
        known = statistics is not None and statistics.second_moment is not None
        return known and any(f"{block.prefix}.{name}" in self._modules for name in names)

    def _source(self, own: slice) -> Tensor:
        return self._states.rows[own].to(self._device)

    def _taken(self, states: Tensor, own: slice) -> Tensor:
        """The followed windows' rows of something that is known of all windows."""
        return self._team.chosen_rows(states, self._rows[own], self._groups).to(self._device)

    def _chunks(self) -> Iterator[slice]:
        return chunks(len(self._rows), self._window_len)


def _moment(statistics: InputStatistics | None) -> Tensor:
    assert statistics is not None
    assert statistics.second_moment is not None
    return statistics.second_moment
