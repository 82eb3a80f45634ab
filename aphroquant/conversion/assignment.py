"""Which scheme and solver each module gets: what is asked for all, and what the rules say of some."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from aphroquant.calibration.solvers import Solver, find_solver
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.rules import ModuleRule, RuleBook
from aphroquant.conversion.targets import TargetScheme, resolve_scheme, resolve_solver
from aphroquant.errors import UsageError

_WEIGHT_ONLY = re.compile(r"w\da16")  # names that leave group size and symmetry open


class Assignment(NamedTuple):
    """The scheme and the solver of each module to be quantized."""

    schemes: dict[str, TargetScheme]
    solvers: dict[str, Solver]


def assign(request: ConversionRequest, book: RuleBook, widths: Mapping[str, int]) -> Assignment:
    """For modules with these in_features. UsageError naming what does not fit, and the rule that asks for it."""
    groups: dict[ModuleRule | None, list[str]] = {}
    for module in widths:
        groups.setdefault(book.rule(module), []).append(module)
    # One automatic group size for all that leave it open: layers differ where somebody asks for it.
    sized = {module: widths[module] for rule, own in groups.items() if _leaves_size_open(rule) for module in own}
    found: dict[str, tuple[TargetScheme, Solver]] = {}
    for rule, modules in groups.items():
        own = {module: widths[module] for module in modules}
        with naming_rule(rule):
            found |= dict.fromkeys(modules, _resolve(request, rule, own, sized))
    return Assignment({module: found[module][0] for module in widths}, {module: found[module][1] for module in widths})


@contextmanager
def naming_rule(rule: ModuleRule | None) -> Iterator[None]:
    """Puts the rule that asks for something before the message of a UsageError about it."""
    try:
        yield
    except UsageError as error:
        if rule is None:
            raise
        raise UsageError(f"rule {str(rule)!r}: {error.message}", hint=error.hint) from error


def with_rule(request: ConversionRequest, rule: ModuleRule) -> ConversionRequest:
    """The request that would ask of all what a rule asks of some. A scheme or bits replace both."""
    scheme, bits, size, symmetric = request.scheme, request.bits, request.group_size, request.symmetric
    if rule.scheme is not None or rule.bits is not None:
        scheme, bits = rule.scheme, rule.bits
    if rule.scheme is not None and not _WEIGHT_ONLY.fullmatch(rule.scheme):
        size = symmetric = None
    return replace(
        request,
        scheme=scheme,
        bits=bits,
        group_size=size if rule.group_size is None else rule.group_size,
        symmetric=symmetric if rule.symmetric is None else rule.symmetric,
        solver=request.solver if rule.solver is None else rule.solver,
    )


def _resolve(
    request: ConversionRequest, rule: ModuleRule | None, widths: Mapping[str, int], sized: Mapping[str, int]
) -> tuple[TargetScheme, Solver]:
    own = request if rule is None else with_rule(request, rule)
    scheme = resolve_scheme(own, widths, sized or widths)
    if rule is not None and rule.solver is None and own.solver is not None and find_solver(own.solver).obstacle(scheme):
        own = replace(own, solver=None)  # the one for all is about other schemes
    return scheme, resolve_solver(own, scheme)


def _leaves_size_open(rule: ModuleRule | None) -> bool:
    if rule is None:
        return True
    return rule.group_size is None and (rule.scheme is None or _WEIGHT_ONLY.fullmatch(rule.scheme) is not None)
