"""Quantizing a model block by block, each layer on the activations of the already quantized ones before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aphroquant.calibration.solution import Solution
from aphroquant.calibration.solvers import rounding_for
from aphroquant.calibration.statistics import InputStatistics, StatisticsCollector
from aphroquant.conversion.activations import Activations, chunks
from aphroquant.conversion.ahead import in_order
from aphroquant.conversion.calibration_block import CacheMaxima, CalibrationBlock
from aphroquant.conversion.dataless import joined, naming_modules, solve_in_pieces, square_sum
from aphroquant.conversion.experts import RoutedTokens
from aphroquant.conversion.following import SourceFollower
from aphroquant.conversion.kv_cache import found_scales
from aphroquant.conversion.output_moments import OutputMoments
from aphroquant.conversion.plan import ConversionPlan
from aphroquant.conversion.refinement import BlockRefiner, Unrounded
from aphroquant.conversion.scaling import SAMPLE_TOKENS, BlockScaler
from aphroquant.conversion.source_pass import SourcePass
from aphroquant.conversion.targets import is_trainable
from aphroquant.conversion.team.task import SolveTask
from aphroquant.conversion.team.team import ALONE, Team, chunks_of, groups
from aphroquant.errors import InputError
from aphroquant.models.decoder import rms_norm
from aphroquant.models.loader import load_final_norm, load_head
from aphroquant.models.spec import DOWN, GATE, INPUT_NORM, LM_HEAD, POST_ATTENTION_NORM, UP, K, O, Q, V
from aphroquant.schemes import IntegerScheme, LookupScheme

CPU = torch.device("cpu")
_HEAD_ROWS = 2**15  # a multiple of all block heights


@dataclass
class SolvedBlock:
    """The solutions of one block by module name, the other tensors that were changed, and what the report says.

    The head, where it is quantized, comes last, as if it were one more block."""

    layer: int
    solutions: dict[str, Solution]
    changed: dict[str, Tensor] = field(default_factory=dict)
    scaling: dict[str, Any] = field(default_factory=dict)
    refinement: dict[str, Any] = field(default_factory=dict)


def solve_without_data(plan: ConversionPlan) -> Iterator[SolvedBlock]:
    """All blocks from the weights alone, each module as soon as it is solved: a block may come in several parts."""
    spec = plan.spec
    layers = {f"{spec.block_prefix(n)}.{linear}": n for n in range(spec.num_layers) for linear in spec.linears(n)}
    layers[LM_HEAD] = spec.num_layers
    sizes = [(module, math.prod(shape)) for module, shape in plan.modules.items()]
    for module, solution in in_order(sizes, partial(solve_in_pieces, plan), max_workers=1):
        yield SolvedBlock(layers[module], {module: solution})


class CalibratedSolver:
    """Solves blocks in order. Between them it holds the hidden states of all windows, as the quantized model has them.

    Within a block: q, k, v; then o; then gate, up; then down, each on inputs that those before it made; experts one
    after another, each on its own tokens and without scaled channels. Then the whole
    block is refined, if the plan says so; the states of the source model are then carried along as well.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        hidden: Activations,
        window_len: int,
        *,
        source: SourcePass | None,
        memory_limit: int,
        device: torch.device = CPU,
        team: Team = ALONE,
    ) -> None:
        """`hidden` are the embedded windows, which are changed; `source` has passed each block before it is solved,
        and is needed to refine. Blocks are solved on `device`."""
        self._plan, self._device = plan, device
        self._window_len, self._memory_limit = window_len, memory_limit
        self._team, self._groups = team, groups(len(hidden), window_len)
        self._scaler = self._make_scaler()
        followers = {module for module, solver in plan.solvers.items() if solver.follows_source}
        self._follower = (
            SourceFollower(hidden, window_len, followers, memory_limit, device, team) if followers else None
        )
        self._refiner = BlockRefiner(plan, window_len, device) if plan.refine_steps else None
        self._unrounded = Unrounded()
        self._hidden, self._source = hidden, source
        self.output_moments: OutputMoments | None = None  # to be set where a solver wants them
        self.before_change: Callable[[], None] = nothing  # called before hidden states are written to

    @property
    def states(self) -> Tensor:
        """The quantized model's hidden states [T, H] behind the blocks solved so far."""
        return self._hidden.rows

    @property
    def followed(self) -> Tensor | None:
        """The source's hidden states of some windows there, if they are followed."""
        return None if self._follower is None else self._follower.states

    @torch.no_grad()
    def solve(self, block: CalibrationBlock) -> SolvedBlock:
        """The next block, which becomes the quantized one."""
        solved = SolvedBlock(block.block.layer, {})
        start = self._hidden.copy(self._memory_limit, self._device) if self._refiner is not None else None
        self._half(block, solved, INPUT_NORM, (Q, K, V), O)
        if block.block.router is None:
            self._half(block, solved, POST_ATTENTION_NORM, (GATE, UP), DOWN)
        else:
            if self._follower is not None:
                self.before_change()
                self._follower.pass_experts(block)
            self._experts(block, solved)
        if start is not None and self._unrounded.weights:
            self._refine(block, solved, start)
        solved.changed |= {name: tensor.cpu() for name, tensor in block.changed.items()}
        return solved

    def _half(self, block: CalibrationBlock, solved: SolvedBlock, norm: str, first: tuple[str, ...], last: str) -> None:
        """The attention or the MLP: layers that read the norm, the one that writes to the residual stream."""
        is_attention = norm == INPUT_NORM
        if self._scaler is not None:
            sample = block.block.norm(norm, self._sample().to(self._device))
            scale = self._scaler.scale_attention if is_attention else self._scaler.scale_mlp
            solved.scaling |= scale(block, sample)
        statistics = self._gather(block, first, lambda rows: block.block.norm(norm, self._states(rows)))
        if self._follower is not None:
            self._follower.correct_first(block, norm, first, statistics, self._hidden.rows)
        self._round(block, solved, first, statistics)
        if is_attention and self._plan.cache_scales:
            block.cache = CacheMaxima()
        inner = self._inner(block, norm, block.attention_mix if is_attention else block.mlp_inner)
        if is_attention and block.cache is not None:
            block.cache.join(self._team)
            solved.changed |= found_scales(block.prefix, block.cache)
        statistics = self._gather(block, (last,), lambda rows: inner.rows[rows].to(self._device))
        if self._follower is not None:
            self.before_change()
            self._follower.correct_last(block, norm, last, statistics, self._hidden.rows, inner.rows)
        self._round(block, solved, (last,), statistics)
        self.before_change()
        for rows in self._chunks():
            output = block.linears[last](inner.rows[rows].to(self._device))
            self._hidden.rows[rows] += output.to(self._hidden.rows.device)

    def _experts(self, block: CalibrationBlock, solved: SolvedBlock) -> None:
        """The router goes on choosing experts by inputs that the quantized layers in front have made."""
        experts, width = block.block.spec.experts, block.block.spec.hidden_size
        assert experts is not None
        inputs = self._inner(block, POST_ATTENTION_NORM, lambda x: x)
        self._team.complete(inputs.rows, self._groups)
        self._check_inputs(f"{block.prefix}.{experts.router}", inputs)
        routed = RoutedTokens(block.block, inputs, self._device)

        def solve(numbers: list[int]) -> dict[int, dict[str, Solution]]:
            return {number: self._expert(block, routed, number) for number in numbers}

        found = self._team.solve(range(experts.num_experts), solve)
        for number, solutions in found.items():
            self._take_over(block, solved, solutions, None)
            self._tell_tokens(block, solved, experts.expert(number), routed.report(number, width))
        for rows in self._chunks():
            output = block.block.mlp(inputs.rows[rows].to(self._device))
            self._hidden.rows[rows] += output.to(self._hidden.rows.device)
        warning = routed.warning(experts.num_experts, width)
        first = next((module for module in solved.solutions if experts.prefix in module), None)
        if first is not None and warning is not None:
            solution = solved.solutions[first]
            solved.solutions[first] = replace(solution, warnings=(*solution.warnings, warning))

    def _expert(self, block: CalibrationBlock, routed: RoutedTokens, number: int) -> dict[str, Solution]:
        """Solutions of one expert, whose layers become the quantized ones."""
        experts = block.block.spec.experts
        assert experts is not None
        gate, up, down = experts.expert(number)
        tokens = routed.tokens(number, block.block.spec.hidden_size)
        found = self._solved(block, (gate, up), self._collect(block, (gate, up), routed.inputs(tokens)))
        for module, solution in found.items():
            block.linears[module.removeprefix(f"{block.prefix}.")].weight = solution.weight.dequantize()
        inner = map(partial(block.block.expert_inner, number), routed.inputs(tokens))
        found |= self._solved(block, (down,), self._collect(block, (down,), inner))
        return {module: self._portable(solution) for module, solution in found.items()}

    def _tell_tokens(
        self, block: CalibrationBlock, solved: SolvedBlock, names: Sequence[str], report: dict[str, Any]
    ) -> None:
        for module in (f"{block.prefix}.{name}" for name in names):
            if (solution := solved.solutions.get(module)) is not None:
                solved.solutions[module] = replace(solution, details=solution.details | report)

    def _check_inputs(self, module: str, inputs: Activations) -> None:
        """InputError naming the first sample whose inputs are not finite."""
        collector = StatisticsCollector(
            module, inputs.rows.shape[1], self._window_len, second_moment=False, device=inputs.rows.device
        )
        for rows in chunks(len(inputs), self._window_len):
            collector.update(inputs.rows[rows])

    def _refine(self, block: CalibrationBlock, solved: SolvedBlock, start: Activations) -> None:
        """Better numbers for a block with these states before it; the states behind it are made anew with them."""
        assert self._refiner is not None and self._source is not None
        unrounded, self._unrounded = self._unrounded, Unrounded()
        for states in (start.rows, self._source.states):
            self._team.complete(states, self._groups)
        if self._team.rank == 0:
            solved.solutions, solved.refinement = self._refiner.refine(
                block, solved.solutions, unrounded, start.rows, self._source.states
            )
        changed = {name: tensor.cpu() for name, tensor in block.changed.items()} if self._team.rank == 0 else {}
        told = self._team.tell((solved.solutions, solved.refinement, changed))
        if self._team.rank:
            self._follow(block, solved, *told)
        self._pass_through(block, start)
        self._hidden = start

    def _follow(
        self,
        block: CalibrationBlock,
        solved: SolvedBlock,
        solutions: dict[str, Solution],
        refinement: dict[str, Any],
        changed: dict[str, Tensor],
    ) -> None:
        """Go on with the numbers that the first worker has refined."""
        solved.solutions, solved.refinement, block.changed = solutions, refinement, changed
        for module, solution in solutions.items():
            own = block.linears[module.removeprefix(f"{block.prefix}.")]
            own.weight = solution.weight.to(self._device).dequantize()
        for norm in block.norms:
            if (gain := changed.get(f"{block.prefix}.{norm}.weight")) is not None:
                block.norms[norm] = gain.float().to(self._device)

    def _pass_through(self, block: CalibrationBlock, states: Activations) -> None:
        for rows in self._chunks():
            states.rows[rows] = block.forward(states.rows[rows].to(self._device))

    def _states(self, rows: slice) -> Tensor:
        """Hidden states of some windows, on the device."""
        return self._hidden.rows[rows].to(self._device)

    def _inner(self, block: CalibrationBlock, norm: str, forward: Callable[[Tensor], Tensor]) -> Activations:
        """The input of the last layer of a half, for all windows."""
        inner: Activations | None = None
        for rows in self._chunks():
            part = forward(block.block.norm(norm, self._states(rows)))
            inner = inner or Activations(
                len(self._hidden), part.shape[1], memory_limit=self._memory_limit, device=self._device
            )
            inner.rows[rows] = part
        assert inner is not None
        return inner

    def _gather(
        self, block: CalibrationBlock, names: Sequence[str], inputs: Callable[[slice], Tensor]
    ) -> InputStatistics | None:
        """Statistics of the input that `names` share; None if none of them is to be quantized."""

        def collected(group: slice) -> StatisticsCollector:
            collector = self._collector(block, names, group.start)
            for rows in chunks_of(group, self._window_len):
                collector.update(inputs(rows))
            return collector

        return self._team.statistics(self._groups, collected) if self._chosen(block, names) else None

    def _collect(
        self, block: CalibrationBlock, names: Sequence[str], parts: Iterable[Tensor]
    ) -> InputStatistics | None:
        """The same of inputs that this worker has all of."""
        if not self._chosen(block, names):
            return None
        collector = self._collector(block, names)
        for part in parts:
            collector.update(part)
        return collector.finish()

    def _chosen(self, block: CalibrationBlock, names: Sequence[str]) -> list[str]:
        """Those that are to be quantized."""
        return [name for name in names if f"{block.prefix}.{name}" in self._plan.modules]

    def _collector(self, block: CalibrationBlock, names: Sequence[str], first_token: int = 0) -> StatisticsCollector:
        modules = [f"{block.prefix}.{name}" for name in names]
        solvers = (self._plan.solvers[module] for module in modules if module in self._plan.modules)
        return StatisticsCollector(
            modules[0],
            block.linears[names[0]].weight.shape[1],
            self._window_len,
            second_moment=any(solver.needs_second_moment for solver in solvers),
            device=self._device,
            first_token=first_token,
        )

    def _round(
        self,
        block: CalibrationBlock,
        solved: SolvedBlock,
        names: Sequence[str],
        statistics: InputStatistics | None,
    ) -> None:
        """Solve those of `names` that are to be quantized, and go on with what they have become."""

        def solve(units: list[tuple[str, ...]]) -> dict[tuple[str, ...], dict[str, Solution]]:
            found = self._solved(block, [name for unit in units for name in unit], statistics)
            return {unit: {name: self._portable(found[f"{block.prefix}.{name}"]) for name in unit} for unit in units}

        chosen = self._chosen(block, names)
        solutions = {
            name: solution
            for unit in self._team.solve(self._units(block, chosen), solve).values()
            for name, solution in unit.items()
        }
        by_module = {f"{block.prefix}.{name}": solutions[name] for name in chosen}
        self._take_over(block, solved, by_module, statistics)

    def _units(self, block: CalibrationBlock, chosen: Sequence[str]) -> list[tuple[str, ...]]:
        """What has to be solved together: layers of one scheme whose weights share a global scale."""
        schemes = {name: self._plan.schemes[f"{block.prefix}.{name}"] for name in chosen}
        units: dict[Any, list[str]] = {}
        for name, scheme in schemes.items():
            shares = isinstance(scheme, LookupScheme) and scheme.scales == "e4m3"
            units.setdefault(scheme if shares else name, []).append(name)
        return [tuple(unit) for unit in units.values()]

    def _solved(
        self, block: CalibrationBlock, names: Sequence[str], statistics: InputStatistics | None
    ) -> dict[str, Solution]:
        """Solutions by module of those of `names` that are to be quantized."""
        chosen = self._chosen(block, names)
        if not chosen:
            return {}
        with naming_modules(
            f"{block.prefix}.{chosen[0]}" if len(chosen) == 1 else f"{block.prefix}: {', '.join(chosen)}"
        ):
            return self._solutions(block, chosen, statistics)

    def _take_over(
        self,
        block: CalibrationBlock,
        solved: SolvedBlock,
        solutions: Mapping[str, Solution],
        statistics: InputStatistics | None,
    ) -> None:
        """Go on with what the layers have become."""
        for module, solution in solutions.items():
            name = module.removeprefix(f"{block.prefix}.")
            if self._refiner is not None and is_trainable(self._plan.schemes[module]):
                self._unrounded.weights[name] = block.linears[name].weight
                self._unrounded.statistics[name] = statistics
            block.linears[name].weight = solution.weight.to(self._device).dequantize()
            solved.solutions[module] = replace(solution, weight=solution.weight.to(CPU))

    def _portable(self, solution: Solution) -> Solution:
        """For workers with other devices."""
        return solution if self._team.size == 1 else replace(solution, weight=solution.weight.to(CPU))

    def _solutions(
        self, block: CalibrationBlock, names: Sequence[str], statistics: InputStatistics | None
    ) -> dict[str, Solution]:
        """By module; those that get the same are solved together."""
        plan, kinds = self._plan, dict[Any, list[str]]()
        for name in names:
            module = f"{block.prefix}.{name}"
            kind = plan.schemes[module], plan.solvers[module].name, plan.calibrates_module(module)
            kinds.setdefault(kind, []).append(name)
        found: dict[str, Solution] = {}
        for own in kinds.values():
            modules = [f"{block.prefix}.{name}" for name in own]
            solver = plan.solvers[modules[0]]
            seen = statistics if plan.calibrates_module(modules[0]) else None
            moments = None
            if solver.needs_output_moments and seen is not None:
                moments = [self._output_moment(block, name) for name in own]
            weights = {module: block.linears[name].weight for module, name in zip(modules, own, strict=True)}
            task = SolveTask(weights, seen, plan.schemes[modules[0]], solver.name, plan.scale_dtype, moments)
            found |= self._team.solutions(task)
        return found

    def _output_moment(self, block: CalibrationBlock, name: str) -> Tensor | None:
        """Of a layer with its rows as they are scaled: gradients by outputs divided by s are s times as large."""
        assert self.output_moments is not None
        moment = self.output_moments.of(f"{block.prefix}.{name}")
        if moment is None:
            return None
        moment, divided = moment.to(self._device), block.divided_rows.get(name)
        return moment if divided is None else moment * divided * divided[:, None]

    def _make_scaler(self) -> BlockScaler | None:
        ways = {module: solver.scales_channels for module, solver in self._plan.solvers.items()}
        scaled = {module: way for module, way in ways.items() if way is not None}
        if not scaled:
            return None
        schemes = {
            module: scheme
            for module, scheme in self._plan.schemes.items()
            if isinstance(scheme, IntegerScheme | LookupScheme)
        }
        checkpoint = self._plan.checkpoint
        return BlockScaler(schemes, scaled, lambda name: checkpoint.tensors[name].dtype)

    def _chunks(self) -> Iterator[slice]:
        """The rows of this worker, a part at a time."""
        return (rows for group in self._team.own(self._groups) for rows in chunks_of(group, self._window_len))

    def _sample(self) -> Tensor:
        """Hidden states of a few whole windows, evenly spread."""
        num_windows = len(self._hidden) // self._window_len
        count = min(num_windows, max(1, SAMPLE_TOKENS // self._window_len))
        starts = torch.arange(count) * num_windows // count * self._window_len
        index = (starts[:, None] + torch.arange(self._window_len)).reshape(-1)
        return self._team.chosen_rows(self._hidden.rows, index, self._groups)


@torch.no_grad()
def solve_observed(plan: ConversionPlan, block: CalibrationBlock, source: SourcePass) -> SolvedBlock:
    """A block of FP8 layers with static inputs, whose scales are those of the source's own activations: rounding to
    eight bits moves them too little to follow it. `block` is not changed."""
    solved = SolvedBlock(block.block.layer, {})
    if plan.cache_scales:
        assert block.cache is not None
        solved.changed = found_scales(block.prefix, block.cache)
    for name, linear in block.linears.items():
        module = f"{block.prefix}.{name}"
        if module not in plan.modules:
            continue
        scheme = plan.schemes[module]
        statistics = source.statistics[module] if plan.calibrates_module(module) else None
        with naming_modules(module):
            rounding = rounding_for(scheme, plan.solvers[module])
            solution = rounding([linear.weight], statistics, scheme, plan.scale_dtype)[0]
        warnings = (source.warnings[module],) if module in source.warnings else ()
        solved.solutions[module] = replace(
            solution,
            weight=solution.weight.to(CPU),
            details=solution.details | source.reports.get(module, {}),
            warnings=(*solution.warnings, *warnings),
        )
    return solved


@torch.no_grad()
def solve_head(plan: ConversionPlan, states: Tensor, window_len: int, device: torch.device) -> SolvedBlock:
    """The head, from the states [T, H] behind all blocks; a piece of its rows at a time, as it may be large."""
    spec, head = plan.spec, load_head(plan.checkpoint)
    gain, scheme, solver = load_final_norm(plan.checkpoint).to(device), plan.schemes[LM_HEAD], plan.solvers[LM_HEAD]
    _check_finite(LM_HEAD, head)
    statistics = None
    if plan.calibrates_module(LM_HEAD):
        collector = StatisticsCollector(
            LM_HEAD, spec.hidden_size, window_len, second_moment=solver.needs_second_moment, device=device
        )
        for rows in chunks(len(states), window_len):
            collector.update(rms_norm(states[rows].to(device), gain, spec.norm_eps))
        statistics = collector.finish()
    rounding = rounding_for(scheme, solver)

    def solved() -> Iterator[tuple[Solution, float]]:
        rows = len(head) if isinstance(scheme, LookupScheme) else _HEAD_ROWS  # which may have one scale for all
        for start in range(0, len(head), rows):
            weight = head[start : start + rows]
            solution = rounding([weight.to(device)], statistics, scheme, plan.scale_dtype)[0]
            yield replace(solution, weight=solution.weight.to(CPU)), square_sum(solution, weight)

    with naming_modules(LM_HEAD):
        return SolvedBlock(spec.num_layers, {LM_HEAD: joined(solved(), plan.modules[LM_HEAD])})


def nothing() -> None:
    """What happens before a change unless someone wants to know."""


def check_weights(block: CalibrationBlock) -> None:
    """InputError naming the first layer of a block with something else than numbers."""
    for name, linear in block.linears.items():
        _check_finite(f"{block.prefix}.{name}", linear.weight)


def _check_finite(module: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise InputError(f"{module}.weight holds NaN or infinite values and cannot be quantized")
