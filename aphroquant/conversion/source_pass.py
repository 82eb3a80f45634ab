"""The source's own hidden states, block after block, and what the inputs of its layers are like.

One pass serves every output that wants to know: GGUF's encoders weigh errors with E[x**2], static FP8 takes its input
scales from max |x|, refined and distilled blocks are compared with the states themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aphroquant.calibration.statistics import InputStatistics, StatisticsCollector
from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.activations import Activations, chunks
from aphroquant.conversion.calibration_block import CacheMaxima, CalibrationBlock
from aphroquant.conversion.experts import RoutedTokens
from aphroquant.conversion.team.team import ALONE, Team, chunks_of, groups
from aphroquant.errors import InputError
from aphroquant.models.loader import load_embedding
from aphroquant.models.spec import DOWN, GATE, INPUT_NORM, POST_ATTENTION_NORM, UP, K, O, Q, V

CPU = torch.device("cpu")


class SourcePass:
    """States of all windows behind the blocks passed so far. With `observes`, `statistics` of the last block's inputs
    by module name; `reports` says on which tokens those of experts are, `warnings` what is wrong with them."""

    def __init__(
        self,
        hidden: Activations,
        window_len: int,
        *,
        observes: bool,
        memory_limit: int,
        device: torch.device = CPU,
        second_moments: bool = False,
        team: Team = ALONE,
    ) -> None:
        """`hidden` are embedded windows; they are changed. `second_moments`: observe E[x x^T] as well."""
        self._hidden, self._window_len = hidden, window_len
        self._observes, self._memory_limit, self._device = observes, memory_limit, device
        self._second_moments = second_moments
        self._team, self._groups = team, groups(len(hidden), window_len)
        self.statistics: dict[str, InputStatistics] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.warnings: dict[str, str] = {}

    @property
    def states(self) -> Tensor:
        """[T, H]."""
        return self._hidden.rows

    @torch.no_grad()
    def step(self, block: CalibrationBlock) -> None:
        """Go through the source's next block, which is not changed."""
        self.statistics, self.reports, self.warnings = {}, {}, {}
        block.cache = CacheMaxima() if self._observes else None
        self._half(block, INPUT_NORM, (Q, K, V), O, block.attention_mix)
        if block.block.router is None:
            self._half(block, POST_ATTENTION_NORM, (GATE, UP), DOWN, block.mlp_inner)
        else:
            self._experts(block)

    def _half(
        self,
        block: CalibrationBlock,
        norm: str,
        first: tuple[str, ...],
        last: str,
        inner: Callable[[Tensor], Tensor],
    ) -> None:
        """The attention or the MLP."""
        collectors: dict[tuple[str, int], StatisticsCollector] = {}
        for group in self._team.own(self._groups):
            if self._observes:
                seen = {name: self._collector(block, name, group.start) for name in (first[0], last)}
                collectors |= {(name, group.start): collector for name, collector in seen.items()}
            for rows in chunks_of(group, self._window_len):
                hidden = self._hidden.rows[rows].to(self._device)
                normed = block.block.norm(norm, hidden)
                mixed = inner(normed)
                if self._observes:
                    seen[first[0]].update(normed)
                    seen[last].update(mixed)
                self._hidden.rows[rows] = (hidden + block.linears[last](mixed)).to(self._hidden.rows.device)
        if self._observes and norm == INPUT_NORM:
            assert block.cache is not None
            block.cache.join(self._team)
        if self._observes:
            for names in (first, (last,)):
                own = {start: collector for (name, start), collector in collectors.items() if name == names[0]}
                self._keep(block, names, self._summed(own))

    def _summed(self, collectors: Mapping[int, StatisticsCollector]) -> InputStatistics:
        """Of all groups. `collectors` are those of this worker's, by their first row."""
        return self._team.statistics(self._groups, lambda group: collectors[group.start])

    def _experts(self, block: CalibrationBlock) -> None:
        if self._observes:
            self._observe_experts(block)
        for rows in self._chunks():
            hidden = self._hidden.rows[rows].to(self._device)
            output = hidden + block.block.mlp(block.block.norm(POST_ATTENTION_NORM, hidden))
            self._hidden.rows[rows] = output.to(self._hidden.rows.device)

    def _observe_experts(self, block: CalibrationBlock) -> None:
        experts, width = block.block.spec.experts, block.block.spec.hidden_size
        assert experts is not None
        routed = RoutedTokens(block.block, self._normed(block), self._device)

        def observe(numbers: list[int]) -> dict[int, tuple[InputStatistics, InputStatistics]]:
            return {number: self._expert(block, routed, number) for number in numbers}

        for number, (outer, inner) in self._team.solve(range(experts.num_experts), observe).items():
            gate, up, down = experts.expert(number)
            self._keep(block, (gate, up), outer)
            self._keep(block, (down,), inner)
            self.reports |= {f"{block.prefix}.{name}": routed.report(number, width) for name in (gate, up, down)}
        warning = routed.warning(experts.num_experts, width)
        if warning is not None:
            self.warnings[f"{block.prefix}.{experts.expert(0)[0]}"] = warning

    def _expert(
        self, block: CalibrationBlock, routed: RoutedTokens, number: int
    ) -> tuple[InputStatistics, InputStatistics]:
        """Of the inputs of an expert, and of its down projection's."""
        assert block.block.spec.experts is not None
        gate, _, down = block.block.spec.experts.expert(number)
        tokens = routed.tokens(number, block.block.spec.hidden_size)
        inner = (block.block.expert_inner(number, part) for part in routed.inputs(tokens))
        return self._collected(block, gate, routed.inputs(tokens)), self._collected(block, down, inner)

    def _normed(self, block: CalibrationBlock) -> Activations:
        """The experts' inputs, of all windows."""
        states = self._hidden.rows
        normed = Activations(len(self._hidden), states.shape[1], memory_limit=self._memory_limit, device=self._device)
        assert block.block.spec.experts is not None
        router = self._collector_of(f"{block.prefix}.{block.block.spec.experts.router}", states.shape[1])
        for rows in self._chunks():
            part = block.block.norm(POST_ATTENTION_NORM, states[rows].to(self._device))
            normed.rows[rows] = part.to(normed.rows.device)
        self._team.complete(normed.rows, self._groups)
        for rows in chunks(len(normed), self._window_len):
            router.update(normed.rows[rows].to(self._device))  # refuses what is not finite
        return normed

    def _chunks(self) -> Iterator[slice]:
        """The rows of this worker, a part at a time."""
        return (rows for group in self._team.own(self._groups) for rows in chunks_of(group, self._window_len))

    def _collected(self, block: CalibrationBlock, name: str, parts: Iterable[Tensor]) -> InputStatistics:
        collector = self._collector(block, name)
        for part in parts:
            collector.update(part)
        return collector.finish()

    def _collector(self, block: CalibrationBlock, name: str, first_token: int = 0) -> StatisticsCollector:
        return self._collector_of(f"{block.prefix}.{name}", block.linears[name].weight.shape[1], first_token)

    def _collector_of(self, module: str, width: int, first_token: int = 0) -> StatisticsCollector:
        return StatisticsCollector(
            module,
            width,
            self._window_len,
            second_moment=self._second_moments,
            device=self._device,
            first_token=first_token,
        )

    def _keep(self, block: CalibrationBlock, names: Sequence[str], found: InputStatistics) -> None:
        self.statistics |= dict.fromkeys((f"{block.prefix}.{name}" for name in names), found)


def embedded(checkpoint: Checkpoint, windows: Tensor, *, memory_limit: int, device: torch.device = CPU) -> Activations:
    """The states [T, H] in front of the first block. InputError for tokens that the model has not."""
    ids, spec = windows.reshape(-1), checkpoint.spec
    if ids.numel() and int(ids.max()) >= spec.vocab_size:
        raise InputError(
            f"the tokenizer gives token id {int(ids.max())}, but the model's vocabulary ends at {spec.vocab_size}"
        )
    hidden = Activations(ids.numel(), spec.hidden_size, memory_limit=memory_limit, device=device)
    embedding = load_embedding(checkpoint)
    for rows in chunks(ids.numel(), windows.shape[1]):
        hidden.rows[rows] = embedding[ids[rows]].to(hidden.rows.device)
    return hidden
