"""The source's own hidden states, block after block, and what the inputs of its layers are like.

One pass serves every output that wants to know: GGUF's encoders weigh errors with E[x**2], static FP8 takes its input
scales from max |x|, refined and distilled blocks are compared with the states themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from aphroquant.calibration.statistics import InputStatistics, StatisticsCollector
from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.activations import Activations, chunks
from aphroquant.conversion.calibration_block import CalibrationBlock
from aphroquant.conversion.experts import RoutedTokens
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
    ) -> None:
        """`hidden` are embedded windows; they are changed. `second_moments`: observe E[x x^T] as well."""
        self._hidden, self._window_len = hidden, window_len
        self._observes, self._memory_limit, self._device = observes, memory_limit, device
        self._second_moments = second_moments
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
        collectors = {name: self._collector(block, name) for name in (first[0], last) if self._observes}
        for rows in chunks(len(self._hidden), self._window_len):
            hidden = self._hidden.rows[rows].to(self._device)
            normed = block.block.norm(norm, hidden)
            mixed = inner(normed)
            if collectors:
                collectors[first[0]].update(normed)
                collectors[last].update(mixed)
            self._hidden.rows[rows] = (hidden + block.linears[last](mixed)).to(self._hidden.rows.device)
        if collectors:
            self._keep(block, first, collectors[first[0]])
            self._keep(block, (last,), collectors[last])

    def _experts(self, block: CalibrationBlock) -> None:
        if self._observes:
            self._observe_experts(block)
        for rows in chunks(len(self._hidden), self._window_len):
            hidden = self._hidden.rows[rows].to(self._device)
            output = hidden + block.block.mlp(block.block.norm(POST_ATTENTION_NORM, hidden))
            self._hidden.rows[rows] = output.to(self._hidden.rows.device)

    def _observe_experts(self, block: CalibrationBlock) -> None:
        experts, width = block.block.spec.experts, block.block.spec.hidden_size
        assert experts is not None
        routed = RoutedTokens(block.block, self._normed(block), self._device)
        for number in range(experts.num_experts):
            gate, up, down = experts.expert(number)
            tokens = routed.tokens(number, width)
            self._keep(block, (gate, up), self._collected(block, gate, routed.inputs(tokens)))
            inner = (block.block.expert_inner(number, part) for part in routed.inputs(tokens))
            self._keep(block, (down,), self._collected(block, down, inner))
            self.reports |= {f"{block.prefix}.{name}": routed.report(number, width) for name in (gate, up, down)}
        warning = routed.warning(experts.num_experts, width)
        if warning is not None:
            self.warnings[f"{block.prefix}.{experts.expert(0)[0]}"] = warning

    def _normed(self, block: CalibrationBlock) -> Activations:
        """The experts' inputs, of all windows."""
        states = self._hidden.rows
        normed = Activations(len(self._hidden), states.shape[1], memory_limit=self._memory_limit, device=self._device)
        assert block.block.spec.experts is not None
        router = self._collector_of(f"{block.prefix}.{block.block.spec.experts.router}", states.shape[1])
        for rows in chunks(len(self._hidden), self._window_len):
            part = block.block.norm(POST_ATTENTION_NORM, states[rows].to(self._device))
            router.update(part)  # refuses what is not finite
            normed.rows[rows] = part.to(normed.rows.device)
        return normed

    def _collected(self, block: CalibrationBlock, name: str, parts: Iterable[Tensor]) -> StatisticsCollector:
        collector = self._collector(block, name)
        for part in parts:
            collector.update(part)
        return collector

    def _collector(self, block: CalibrationBlock, name: str) -> StatisticsCollector:
        return self._collector_of(f"{block.prefix}.{name}", block.linears[name].weight.shape[1])

    def _collector_of(self, module: str, width: int) -> StatisticsCollector:
        return StatisticsCollector(
            module, width, self._window_len, second_moment=self._second_moments, device=self._device
        )

    def _keep(self, block: CalibrationBlock, names: Sequence[str], collector: StatisticsCollector) -> None:
        self.statistics |= dict.fromkeys((f"{block.prefix}.{name}" for name in names), collector.finish())


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
