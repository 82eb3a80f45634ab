"""One walk over a source's blocks for all outputs that calibrate: each block is loaded once.

Outputs whose numbers are the same (one scheme, one solver, the same layers, whatever the format) share a branch: it is
solved once, and each writes it. Other integer schemes are branches with hidden states of their own, since every layer
is solved on what the quantized ones in front of it make. What is asked of the source's own states is one pass for all.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from aphroquant.calibration.statistics import InputStatistics
from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.activations import default_memory_limit
from aphroquant.conversion.blocks import CalibratedSolver, SolvedBlock, check_weights, solve_head, solve_observed
from aphroquant.conversion.calibration_block import CalibrationBlock, load_calibration_block
from aphroquant.conversion.distillation import Distiller
from aphroquant.conversion.plan import ConversionPlan
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.source_pass import SourcePass, embedded
from aphroquant.conversion.targets import is_trainable
from aphroquant.conversion.training_memory import refusal
from aphroquant.models.spec import LM_HEAD


class Output(Protocol):
    """What takes a branch's blocks."""

    def take(self, solved: SolvedBlock) -> None: ...

    def distilled(self, report: dict[str, object], seconds: float) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class _Options(TypedDict):
    memory_limit: int
    device: torch.device


class Branch:
    """One solution of the model, and the outputs that write it."""

    def __init__(self, plan: ConversionPlan, outputs: Sequence[Output]) -> None:
        self.plan, self.outputs = plan, list(outputs)
        self.solver: CalibratedSolver | None = None
        self.solved: list[SolvedBlock] = []  # all of them, if the model is distilled in the end

    @property
    def observes(self) -> bool:
        """Whether the source's own activations tell all that it needs."""
        return not any(map(is_trainable, self.plan.schemes.values()))

    @property
    def compares(self) -> bool:
        """Whether the source's states are what it is trained towards."""
        return self.plan.refine_steps > 0 or self.plan.distill_steps > 0

    def take(self, block: CalibrationBlock, source: SourcePass | None) -> None:
        """Solve a block of the source and hand it on."""
        if self.solver is not None:
            solved = self.solver.solve(block.copy())
        else:
            assert source is not None
            solved = solve_observed(self.plan, block, source)
        if self.plan.distill_steps:
            self.solved.append(solved)
        else:
            self.write([solved])

    def write(self, blocks: Sequence[SolvedBlock]) -> None:
        for block in blocks:
            for output in self.outputs:
                output.take(block)


def branches(pairs: Sequence[tuple[ConversionPlan, Output]]) -> list[Branch]:
    """Outputs with equal numbers together, in the order of their first."""
    found: dict[Hashable, Branch] = {}
    for plan, output in pairs:
        found.setdefault(numbers_key(plan), Branch(plan, [])).outputs.append(output)
    return list(found.values())


def numbers_key(plan: ConversionPlan) -> Hashable:
    """Equal for plans of one source that have the same solution."""
    layers = tuple(
        (module, scheme, plan.solvers[module].name if is_trainable(scheme) else None, plan.calibrates_module(module))
        for module, scheme in plan.schemes.items()
    )
    steps = plan.refine_steps, plan.distill_steps
    return layers, plan.scale_dtype, steps, plan.request.seed if any(steps) else 0


class Walk:
    """The walk for some branches. With `observes`, `statistics` are those of every layer's inputs afterwards."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Tensor,
        branches: Sequence[Branch],
        device: torch.device,
        progress: Progress,
        *,
        observes: bool,
    ) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self._checkpoint, self._windows, self._branches = checkpoint, windows, branches
        self._device, self._progress, self._observes = device, progress, observes
        for branch in branches:
            _without_room(branch, windows.shape[1], device)
        solving = [branch for branch in branches if not branch.observes]
        looks = observes or len(solving) < len(branches)
        keeps_source = looks or any(branch.compares for branch in branches)
        refines = any(branch.plan.refine_steps for branch in branches)
        limit = default_memory_limit(len(solving) + keeps_source + refines + 1)  # the last for what is between layers
        hidden = embedded(checkpoint, windows, memory_limit=limit, device=device)
        self._source: SourcePass | None = None
        options: _Options = {"memory_limit": limit, "device": device}
        if keeps_source:
            own = hidden.copy(limit, device) if solving else hidden
            self._source = SourcePass(own, windows.shape[1], observes=looks, **options)
        for branch in solving:
            states = hidden if branch is solving[-1] else hidden.copy(limit, device)
            branch.solver = CalibratedSolver(branch.plan, states, windows.shape[1], source=self._source, **options)
        if hidden.spilled:
            for branch in branches:
                for output in branch.outputs:
                    output.note("the hidden states are kept in a temporary file")

    def run(self) -> None:
        """All blocks, and then the training of whole models."""
        total = self._checkpoint.spec.num_layers
        self._progress.block(0, total)
        for layer in range(total):
            self._pass(load_calibration_block(self._checkpoint, layer, self._windows.shape[1], self._device))
            self._progress.block(layer + 1, total)
        for branch in self._branches:
            head = self._head(branch) if LM_HEAD in branch.plan.modules else []
            if branch.plan.distill_steps:
                self._distill(branch)
            branch.write(head)

    def _head(self, branch: Branch) -> list[SolvedBlock]:
        states = branch.solver or self._source
        assert states is not None
        return [solve_head(branch.plan, states.states, self._windows.shape[1], self._device)]

    def _pass(self, block: CalibrationBlock) -> None:
        check_weights(block)
        if self._source is not None:
            self._source.step(block)
        if self._observes and self._source is not None:
            self.statistics |= self._source.statistics
        for branch in self._branches:
            branch.take(block, self._source)

    def _distill(self, branch: Branch) -> None:
        assert self._source is not None
        self._progress.stage("distilling")
        begun = time.monotonic()
        distiller = Distiller(branch.plan, self._windows, branch.solved, self._source.states, self._device)
        found = distiller.run(branch.solved, self._progress.block)
        for output in branch.outputs:
            output.distilled(found.report, time.monotonic() - begun)
        self._progress.stage("packing")
        branch.write(found.blocks)
        branch.solved = []


def _without_room(branch: Branch, window_len: int, device: torch.device) -> None:
    """Leave distillation out, and say so, where the memory does not suffice for it."""
    if branch.plan.distill_steps and (reason := refusal(branch.plan, window_len, device)):
        for output in branch.outputs:
            output.warn(reason)
        branch.plan = replace(branch.plan, distill_steps=0)
