"""One walk over a source's blocks for all outputs that calibrate: each block is loaded once.

Outputs whose numbers are the same (one scheme, one solver, the same layers, whatever the format) share a branch: it is
solved once, and each writes it. Other integer schemes are branches with hidden states of their own, since every layer
is solved on what the quantized ones in front of it make. What is asked of the source's own states is one pass for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from aphroquant.calibration.statistics import InputStatistics
from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.activations import default_memory_limit
from aphroquant.conversion.blocks import (
    CalibratedSolver,
    SolvedBlock,
    check_weights,
    nothing,
    solve_head,
    solve_observed,
)
from aphroquant.conversion.calibration_block import CalibrationBlock, load_calibration_block
from aphroquant.conversion.distillation import Distiller
from aphroquant.conversion.following import FOLLOWED_TOKENS
from aphroquant.conversion.job.job import Job
from aphroquant.conversion.job.steps import StepKeeper
from aphroquant.conversion.output_moments import output_moments
from aphroquant.conversion.passed import PassedBlock
from aphroquant.conversion.plan import ConversionPlan
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.source_pass import SourcePass, embedded
from aphroquant.conversion.team.team import ALONE, Team, groups
from aphroquant.conversion.training_memory import refusal
from aphroquant.models.spec import LM_HEAD
from aphroquant.schemes import FloatScheme

_BYTES_A_WEIGHT = 1.125  # codes of one byte, and their scales


class Output(Protocol):
    """What takes a branch's blocks."""

    def take(self, solved: SolvedBlock) -> None: ...

    def distilled(self, report: dict[str, object], seconds: float) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class _Options(TypedDict):
    memory_limit: int
    device: torch.device
    team: Team


class Branch:
    """One solution of the model, and the outputs that write it."""

    def __init__(self, plan: ConversionPlan, outputs: Sequence[Output]) -> None:
        self.plan, self.outputs = plan, list(outputs)
        self.solver: CalibratedSolver | None = None
        self.solved: list[SolvedBlock] = []  # all of them, if the model is distilled in the end

    @property
    def observes(self) -> bool:
        """Whether the source's own activations tell all that it needs."""
        plain = (not self.plan.solvers[module].needs_second_moment for module in self.plan.schemes)
        return all(plain) and all(isinstance(scheme, FloatScheme) for scheme in self.plan.schemes.values())

    @property
    def compares(self) -> bool:
        """Whether the source's states are what it is trained towards."""
        return self.plan.refine_steps > 0 or self.plan.distill_steps > 0

    def solve(self, block: CalibrationBlock, source: SourcePass | None, *, writes: bool) -> SolvedBlock:
        """What becomes of a block of the source; maybe nothing where nobody `writes` it."""
        if self.solver is not None:
            return self.solver.solve(block.copy())
        assert source is not None
        return solve_observed(self.plan, block, source) if writes else SolvedBlock(block.block.layer, {})

    def hand_on(self, solved: SolvedBlock) -> None:
        """Write a block, or keep it until the model is distilled."""
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
        (module, scheme, plan.solvers[module].name, plan.calibrates_module(module))
        for module, scheme in plan.schemes.items()
    )
    steps = plan.refine_steps, plan.distill_steps
    return layers, plan.scale_dtype, plan.request.kv_scales, steps, plan.request.seed if any(steps) else 0


class Walk:
    """The walk for some branches. With `observes`, `statistics` are those of every layer's inputs afterwards."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Tensor,
        branches: Sequence[Branch],
        device: torch.device,
        progress: Progress,
        job: Job,
        team: Team = ALONE,
        *,
        observes: bool,
    ) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self._checkpoint, self._windows, self._branches = checkpoint, windows, branches
        self._device, self._progress, self._job, self._observes = device, progress, job, observes
        self._team, self._groups = team, groups(windows.numel(), windows.shape[1])
        for number, branch in enumerate(branches):
            self._check_room(branch, number)
        solving = [branch for branch in branches if not branch.observes]
        looks = observes or len(solving) < len(branches)
        keeps_source = looks or any(branch.compares for branch in branches)
        refines = any(branch.plan.refine_steps for branch in branches)
        limit = default_memory_limit(len(solving) + keeps_source + refines + 1)  # the last for what is between layers
        hidden = embedded(checkpoint, windows, memory_limit=limit, device=device)
        self._source: SourcePass | None = None
        options: _Options = {"memory_limit": limit, "device": device, "team": team}
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
        self._gather_output_moments()
        self._progress.block(0, total)
        for passed in self._job.passes(self):
            self.statistics |= passed.statistics
            for branch, solved in zip(self._branches, passed.solved, strict=True):
                branch.hand_on(solved)
            self._progress.block(passed.layer + 1, total)
        for number, branch in enumerate(self._branches):
            head = self._head(branch) if LM_HEAD in branch.plan.modules else []
            if branch.plan.distill_steps:
                self._distill(branch, self._job.steps(number))
            branch.write(head)

    def help(self) -> None:
        """What other workers than the first do: their share of all blocks."""
        self._gather_output_moments()
        for _ in self.passes():
            pass

    def passes(
        self,
        first: int = 0,
        before_change: Callable[[], None] = nothing,
        wants_states: Callable[[int], bool] = lambda layer: False,
    ) -> Iterator[PassedBlock]:
        """The source's blocks from `first` on, with the states in front of it; they change after `before_change`.

        The first worker decides; `wants_states` tells whether `states` behind a block will be asked for.
        """
        total, first = self._checkpoint.spec.num_layers, self._team.tell(first)
        for rows in self.states(first - 1).values() if first else ():
            self._team.hand_out(rows)
        for branch in self._branches:
            if branch.solver is not None:
                branch.solver.before_change = before_change
        for layer in range(first, total):
            block = load_calibration_block(self._checkpoint, layer, self._windows.shape[1], self._device)
            check_weights(block)
            if self._source is not None:
                before_change()
                self._source.step(block)
            passed = self._passed(block)
            before_change()  # what comes from other workers is a change as well
            if self._team.tell(wants_states(layer) or layer + 1 == total):
                for rows in self.states(layer).values():
                    if len(rows) == self._windows.numel():  # else all workers have all of them
                        self._team.complete(rows, self._groups)
            yield passed

    def states(self, layer: int) -> dict[str, Tensor]:
        """The states behind a block that all further work depends on: views of them, to be read or filled."""
        last = layer + 1 == self._checkpoint.spec.num_layers
        found = {}
        for number, branch in enumerate(self._branches):
            if branch.solver is not None and (not last or LM_HEAD in branch.plan.modules):
                found[f"branch {number}"] = branch.solver.states
                if not last and branch.solver.followed is not None:
                    found[f"source of branch {number}"] = branch.solver.followed
        later = any(branch.plan.distill_steps or LM_HEAD in branch.plan.modules for branch in self._branches)
        if self._source is not None and (not last or later):
            found["source"] = self._source.states
        return found

    def _gather_output_moments(self) -> None:
        """One pass over the source for all branches whose solvers want gradients."""
        solving = [branch for branch in self._branches if branch.solver is not None]
        wanted = {module for branch in solving for module in branch.plan.needs_output_moments}
        if not wanted:
            return
        self._progress.stage("observing gradients")
        seed, tell = solving[0].plan.request.seed, self._progress.block
        found = output_moments(self._checkpoint, self._windows, wanted, seed=seed, device=self._device, on_block=tell)
        for branch in solving:
            assert branch.solver is not None
            branch.solver.output_moments = found
        self._progress.stage("calibrating and solving")

    def _head(self, branch: Branch) -> list[SolvedBlock]:
        states = branch.solver or self._source
        assert states is not None
        return [solve_head(branch.plan, states.states, self._windows.shape[1], self._device)]

    def _check_room(self, branch: Branch, number: int) -> None:
        """Leave distillation out, and say so, where the memory does not suffice for it."""
        found = refusal(branch.plan, self._windows.shape[1], self._device) if branch.plan.distill_steps else None
        if reason := self._team.tell(self._job.decide(f"no distillation {number}", found)):
            for output in branch.outputs:
                output.warn(reason)
            branch.plan = replace(branch.plan, distill_steps=0)

    def _passed(self, block: CalibrationBlock) -> PassedBlock:
        solved = [branch.solve(block, self._source, writes=self._team.rank == 0) for branch in self._branches]
        statistics = self._source.statistics if self._observes and self._source is not None else {}
        return PassedBlock(block.block.layer, solved, statistics)

    def _distill(self, branch: Branch, keeper: StepKeeper) -> None:
        assert self._source is not None
        self._progress.stage("distilling")
        begun = time.monotonic()
        distiller = Distiller(branch.plan, self._windows, branch.solved, self._source.states, self._device)
        found = distiller.run(branch.solved, self._progress.block, keeper)
        for output in branch.outputs:
            output.distilled(found.report, time.monotonic() - begun)
        self._progress.stage("packing")
        branch.write(found.blocks)
        branch.solved = []


def kept_bytes(checkpoint: Checkpoint, branches: Sequence[Branch], num_tokens: int, *, observes: bool) -> int:
    """About what a walk's job takes at most: its states twice, and all blocks."""
    stores = sum(not branch.observes for branch in branches)
    stores += observes or any(branch.observes or branch.compares for branch in branches)
    weights = sum(rows * columns for branch in branches for rows, columns in branch.plan.modules.values())
    following = sum(any(solver.follows_source for solver in branch.plan.solvers.values()) for branch in branches)
    rows = num_tokens * stores + min(num_tokens, FOLLOWED_TOKENS) * following
    return int(rows * checkpoint.spec.hidden_size * 4 * 2 + weights * _BYTES_A_WEIGHT)
