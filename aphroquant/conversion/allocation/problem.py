"""What there is to choose: the same conversion planned with each width, and the layers whose widths may differ."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.disk import size_text
from aphroquant.conversion.fused import fused_groups
from aphroquant.conversion.gguf_plan import GgufPlan, make_gguf_plan
from aphroquant.conversion.gguf_types import BY_BITS, MIXES, PURE
from aphroquant.conversion.plan import ConversionPlan, make_plan
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.rules import ModuleRule, RuleBook
from aphroquant.conversion.targets import ENGINE_BITS, WEIGHT_ONLY_BITS
from aphroquant.errors import UsageError
from aphroquant.models.spec import LM_HEAD, DecoderSpec

MIXED_TARGETS = ("gptq", "auto-round", "compressed-tensors", "gguf")  # which hold other widths in every layer


@dataclass(frozen=True)
class Width:
    """The conversion with one width for all layers that no rule decides for. `setting` is what a rule would say.

    `sizes` are the bytes of each module among others of other widths: formats pack some tensors otherwise then."""

    label: str
    setting: Mapping[str, Any]
    plan: ConversionPlan | GgufPlan
    sizes: Mapping[str, int]

    def kind(self, module: str) -> Hashable:
        """Equal for widths that make the same numbers of a module."""
        return self.plan.types[module] if isinstance(self.plan, GgufPlan) else self.plan.schemes[module]

    def text(self, module: str) -> str:
        """What a report calls it."""
        return str(self.kind(module))

    def num_bytes(self, module: str) -> int:
        return self.sizes[module]


@dataclass(frozen=True)
class Item:
    """Modules that get the same width. `widths` are those that differ for them, by their places in the problem."""

    kind: str
    modules: tuple[str, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """`budget` counts bytes of the items' modules; `fixed` are those of what is quantized beside them."""

    request: ConversionRequest
    widths: tuple[Width, ...]
    items: tuple[Item, ...]
    budget: int
    fixed: int
    num_weights: int

    def costs(self, item: Item) -> list[int]:
        """Bytes for each of the item's widths."""
        return [sum(self.widths[place].num_bytes(module) for module in item.modules) for place in item.widths]

    def bits(self, num_bytes: int) -> float:
        """The average of all that is quantized if the items take so many bytes."""
        return 8 * (num_bytes + self.fixed) / self.num_weights

    def rules(self, choice: Sequence[int]) -> tuple[ModuleRule, ...]:
        """The rules that give each item what was chosen, and leave all else as the user's rules have it."""
        plan = self.widths[0].plan
        book = RuleBook(self.request.rules, plan.checkpoint.spec, plan.checkpoint.schemes())
        found = []
        for item, number in zip(self.items, choice, strict=True):
            setting = self.widths[item.widths[number]].setting
            for module in item.modules:
                own = book.rule(module)
                rule = ModuleRule(module, **setting)
                found.append(rule if own is None else replace(own, match=module, **setting))
        return tuple(found)


def make_problem(checkpoint: Checkpoint, request: ConversionRequest) -> Problem:
    """UsageError for what cannot be chosen, or for a budget below the least."""
    if request.to not in MIXED_TARGETS:
        raise UsageError(
            f"{_asked(request)} needs a format that holds layers of different widths, which {request.to} does not",
            hint=f"{', '.join(MIXED_TARGETS)} do",
        )
    for able in _able(request.to):
        problem, others = _problem(checkpoint, request, able)
        least, most = (sum(choose(problem.costs(item)) for item in problem.items) for choose in (min, max))
        if problem.budget >= least:
            return problem
    raise _out_of_reach(problem, request, others, least, most)


def _able(target: str) -> list[tuple[int, ...]]:
    """Widths to choose from: those that engines run, and, if the budget is below them, all that the target holds."""
    if target == "gguf":
        return [()]
    return list(dict.fromkeys([ENGINE_BITS.get(target, WEIGHT_ONLY_BITS[target]), WEIGHT_ONLY_BITS[target]]))


def _problem(checkpoint: Checkpoint, request: ConversionRequest, able: Sequence[int]) -> tuple[Problem, int]:
    """With these widths; and the bytes of all tensors that there is nothing to choose for."""
    widths = _widths(checkpoint, request, able)
    items = _items(checkpoint.spec, widths)
    if not items:
        raise UsageError(f"{_asked(request)} leaves nothing to choose: rules or --ignore decide for all layers")
    base, sizes = widths[0].plan, widths[0].sizes
    if isinstance(base, GgufPlan):  # what is no layer of a block has its usual type, whatever the layers get
        base = make_gguf_plan(checkpoint, _plain(request), "chosen anew", checks_disk=False)
        sizes = base.module_bytes
    chosen = {module for item in items for module in item.modules}
    fixed = sum(sizes[module] for module in base.modules if module not in chosen)
    num_weights = sum(rows * columns for rows, columns in base.modules.values())
    others = base.num_bytes - sum(base.module_bytes[module] for module in base.modules) + fixed
    if request.average_bits is not None:
        budget = math.floor(request.average_bits * num_weights / 8) - fixed
    else:
        assert request.size is not None
        budget = request.size - others
    return Problem(request, widths, items, budget, fixed, num_weights), others


def _plain(request: ConversionRequest) -> ConversionRequest:
    return replace(request, bits=None, size=None)


def _widths(checkpoint: Checkpoint, request: ConversionRequest, able: Sequence[int]) -> tuple[Width, ...]:
    plain = _plain(request)
    if request.to == "gguf":
        names = [name for name in dict.fromkeys(BY_BITS.values()) if name not in MIXES]
        names += [mix.base.lower() for name, mix in MIXES.items() if name in BY_BITS.values()]
        return tuple(
            Width(PURE[name], {"scheme": name}, plan, plan.module_bytes)
            for name in sorted(names)
            for plan in [make_gguf_plan(checkpoint, replace(plain, scheme=name), "chosen anew", checks_disk=False)]
        )
    plans = [make_plan(checkpoint, replace(plain, bits=bits), checks_disk=False) for bits in able]
    uniform = [Width(str(bits), {"bits": bits}, plan, {}) for bits, plan in zip(able, plans, strict=True)]
    items = _items(checkpoint.spec, uniform)
    return tuple(replace(width, sizes=_mixed_sizes(checkpoint, width, items, able)) for width in uniform)


def _mixed_sizes(checkpoint: Checkpoint, width: Width, items: Sequence[Item], able: Sequence[int]) -> Mapping[str, int]:
    """Bytes of each module with this width where one item has another; of that item, where the next one has."""
    sizes: dict[str, int] = {}
    request = width.plan.request
    other = next((bits for bits in able if bits != request.bits), None)
    for odd in items[:2] if other is not None else ():
        rules = tuple(ModuleRule(module, bits=other) for module in odd.modules)
        plan = make_plan(checkpoint, replace(request, rules=(*request.rules, *rules)), checks_disk=False)
        sizes |= {module: size for module, size in plan.module_bytes.items() if module not in odd.modules}
    return {**width.plan.module_bytes, **sizes}


def _items(spec: DecoderSpec, widths: Sequence[Width]) -> tuple[Item, ...]:
    """Fused groups, and single modules, whose numbers depend on the width."""
    modules = widths[0].plan.modules if not isinstance(widths[0].plan, GgufPlan) else widths[0].plan.types
    free = {module: places for module in modules if len(places := _different(widths, module)) > 1 and module != LM_HEAD}
    linears = [module for module in spec.modules() if module in free]
    if not isinstance(widths[0].plan, GgufPlan) and LM_HEAD in widths[0].plan.modules:
        _require_decided(widths)
    group_of = {module: group for group in fused_groups(spec) for module in group}
    grouped: dict[tuple[str, ...], list[str]] = {}
    for module in linears:
        grouped.setdefault(group_of.get(module, (module,)), []).append(module)
    return tuple(Item(own[0].split(".", 3)[3], tuple(own), free[own[0]]) for own in grouped.values())


def _require_decided(widths: Sequence[Width]) -> None:
    if len(_different(widths, LM_HEAD)) > 1:
        raise UsageError("a rule quantizes lm_head, but leaves its bits open, and only those of blocks are chosen")


def _different(widths: Sequence[Width], module: str) -> tuple[int, ...]:
    """The first of all widths that make the same numbers of a module."""
    found: dict[Hashable, int] = {}
    for place, width in enumerate(widths):
        found.setdefault(width.kind(module), place)
    return tuple(found.values())


def _out_of_reach(problem: Problem, request: ConversionRequest, others: int, least: int, most: int) -> UsageError:
    """For a budget below the `least` that the items can take."""
    if request.average_bits is not None:
        return UsageError(
            f"--bits {request.average_bits:g}: the least that {request.to} can hold is {problem.bits(least):.3f} bits, "
            "scales and zero points included",
            hint=f"between {problem.bits(least):.3f} and {problem.bits(most):.3f} can be had; larger groups take less",
        )
    return UsageError(
        f"{_asked(request)}: the tensors take {size_text(others + least)} at least",
        hint=f"between {size_text(others + least)} and {size_text(others + most)} can be had",
    )


def _asked(request: ConversionRequest) -> str:
    if request.average_bits is not None:
        return f"--bits {request.average_bits:g}"
    return f"--size {size_text(request.size or 0)}"
