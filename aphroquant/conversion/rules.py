"""Rules: what some modules get in place of what a conversion asks for all.

A rule names modules by a pattern, as --ignore does, by what they do in the model (a role), and by the layers that they
are in: `down_proj`, `model.layers.0.*`, `v`, `layers[0:2]`, `layers[-1].mlp`. The last rule that matches a module
decides, and it alone: what it leaves open is as for all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from aphroquant.errors import UsageError
from aphroquant.models.spec import DOWN, EMBEDDING, GATE, LM_HEAD, UP, DecoderSpec, K, O, Q, V

# What a linear of a block does; an expert's gate, up and down are "experts" as well.
_ROLES: Mapping[str, tuple[str, ...]] = {
    Q: ("q", "attention"),
    K: ("k", "attention"),
    V: ("v", "attention"),
    O: ("o", "attention"),
    GATE: ("gate", "mlp"),
    UP: ("up", "mlp"),
    DOWN: ("down", "mlp"),
}
ROLES = ("attention", "mlp", "q", "k", "v", "o", "gate", "up", "down", "experts", "router", "lm_head", "embedding")
_RANGE = re.compile(r"layers\[([^\]]*)\](?:\.(.+))?")
_SLICE = re.compile(r"(-?\d+)?(:(-?\d+)?(:(-?\d+)?)?)?")
_WILDCARDS = frozenset("*?[")
_FLAGS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class ModuleRule:
    """What the modules that `match` get: a scheme by name or by its parts, a solver, or nothing at all (`keep`: they
    stay dense). None leaves a setting as it is for all."""

    match: str
    scheme: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    solver: str | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if not self.match.strip():
            raise UsageError("a rule names no modules", hint=_form())
        settings = {name: value for name, value in asdict(self).items() if name not in ("match", "keep")}
        given = [name for name, value in settings.items() if value is not None]
        if self.keep and given:
            raise UsageError(f"rule {self.match!r} keeps modules dense, so that {given[0]} says nothing of them")
        if not self.keep and not given:
            raise UsageError(f"rule {self.match!r} sets nothing", hint=_form())
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise UsageError(f"rule {self.match!r}: bits = {self.bits} must be between 1 and 8")
        if self.group_size is not None and self.group_size < 1 and self.group_size != -1:
            raise UsageError(
                f"rule {self.match!r}: group_size = {self.group_size} must be positive, or -1 for one group a row"
            )
        if found := _RANGE.fullmatch(self.match):
            _slice(found[1], self.match)

    def to_dict(self) -> dict[str, Any]:
        """What is set, as JSON can hold it."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False} | (
            {"symmetric": False} if self.symmetric is False else {}
        )

    def __str__(self) -> str:
        settings = {name: value for name, value in self.to_dict().items() if name not in ("match", "keep")}
        parts = [f"{name}={str(value).lower()}" for name, value in settings.items()]
        return f"{self.match}: {', '.join(['keep'] if self.keep else parts)}"


def parse_rule(text: str) -> ModuleRule:
    """The rule that a line means: `down_proj: bits=8, group_size=32`, `layers[0:2]: keep`."""
    match, colon, settings = text.rpartition(":")
    if not colon or not match.strip() or ("[" in match and "]" not in match):
        raise UsageError(f"--rule {text!r} is no rule", hint=_form())
    found: dict[str, Any] = {}
    for setting in settings.split(","):
        name, equals, value = (part.strip() for part in setting.strip().partition("="))
        name = name.replace("-", "_")
        if not equals and name in ("keep", "symmetric", "asymmetric"):
            name, value = ("symmetric", "false") if name == "asymmetric" else (name, "true")
        if name not in _READERS:
            near = difflib.get_close_matches(name, [*_READERS, "asymmetric"], n=1)
            hint = (f"Did you mean {near[0]!r}? " if near else "") + _form()
            raise UsageError(f"--rule {text!r}: {setting.strip()!r} sets nothing that is known", hint=hint)
        if name in found:
            raise UsageError(f"--rule {text!r} sets {name} twice")
        try:
            found[name] = _READERS[name](value)
        except (ValueError, KeyError):
            wanted = "a whole number" if _READERS[name] is int else "true or false"
            raise UsageError(f"--rule {text!r}: {name} = {value!r} must be {wanted}") from None
    return ModuleRule(match.strip(), **found)


class RuleBook:
    """The rules of a conversion, for the modules of one model. UsageError for a rule that matches none of them."""

    def __init__(self, rules: Sequence[ModuleRule], spec: DecoderSpec, others: Iterable[str] = ()) -> None:
        """`others` are modules that the model has beside those of a decoder; only whole names reach them."""
        self._spec = spec
        self._others = tuple(others)
        self._decided: dict[str, ModuleRule] = {}
        names = set(self._named)
        for rule in rules:
            # Rules that an allocation has made name one module each, and there may be thousands of them.
            whole = rule.match in names
            matching = [rule.match] if whole else [m for m in self._named if self._matches(rule.match, m)]
            if not matching:
                raise UsageError(f"rule {rule.match!r} matches no module", hint=self._suggestion(rule.match))
            self._decided |= dict.fromkeys(matching, rule)

    def rule(self, module: str) -> ModuleRule | None:
        """What decides for a module; None if no rule does."""
        return self._decided.get(module)

    @property
    def decided(self) -> Mapping[str, ModuleRule]:
        """All modules that some rule decides for."""
        return self._decided

    @cached_property
    def routers(self) -> frozenset[str]:
        """The modules that choose experts."""
        spec, experts = self._spec, self._spec.experts
        if experts is None:
            return frozenset()
        layers = (layer for layer in range(spec.num_layers) if spec.has_experts(layer))
        return frozenset(f"{spec.block_prefix(layer)}.{experts.router}" for layer in layers)

    @cached_property
    def _layers(self) -> dict[str, int]:
        """The layer of each block linear, in the order of execution."""
        spec = self._spec
        return {
            f"{spec.block_prefix(layer)}.{linear}": layer
            for layer in range(spec.num_layers)
            for linear in spec.linears(layer)
        }

    @cached_property
    def _named(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self._layers, *sorted(self.routers), LM_HEAD, EMBEDDING, *self._others]))

    def _matches(self, match: str, module: str) -> bool:
        if found := _RANGE.fullmatch(match):
            chosen = range(self._spec.num_layers)[_slice(found[1], match)]
            inside = self._layers.get(module, -1) in chosen
            return inside and (found[2] is None or self._matches(found[2], module))
        if match in ROLES:
            return match in self._roles(module)
        # A head, an embedding or a router is meant only by who names it: "*" is about the layers of blocks.
        return matches(module, match) and (module in self._layers or not _WILDCARDS & set(match))

    def _roles(self, module: str) -> tuple[str, ...]:
        if module in self.routers:
            return ("router",)
        if module not in self._layers:
            return {LM_HEAD: ("lm_head",), EMBEDDING: ("embedding",)}.get(module, ())
        linear = module.removeprefix(f"{self._spec.block_prefix(self._layers[module])}.")
        if linear in _ROLES:
            return _ROLES[linear]
        assert self._spec.experts is not None
        place = self._spec.experts.linears.index(linear.rpartition(".")[2])
        return (*_ROLES[(GATE, UP, DOWN)[place]], "experts")

    def _suggestion(self, match: str) -> str:
        found = _RANGE.fullmatch(match)
        wanted = match if found is None else found[2] or ""
        last_names = [module.rpartition(".")[2] for module in self._named]
        near = difflib.get_close_matches(wanted, dict.fromkeys([*ROLES, *last_names, *self._named]), n=1)
        if near:
            return f"Did you mean {match.removesuffix(wanted) + near[0]!r}?"
        return f"roles are {', '.join(ROLES)}; a name is {self._named[0]}; the model has {self._spec.num_layers} layers"


def matches(module: str, pattern: str) -> bool:
    """Whether a pattern matches the name, or its end from some dot on."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def _slice(text: str, match: str) -> slice:
    """What stands in the brackets of layers[...]."""
    found = _SLICE.fullmatch(text.strip())
    if found is None or not text.strip() or (found[5] is not None and int(found[5]) == 0):
        raise UsageError(
            f"rule {match!r}: [{text}] is no range of layers", hint="as layers[3], layers[0:2], layers[-2:]"
        )
    if found[2] is None:
        first = int(found[1])
        return slice(first, first + 1 or None)
    start, stop, step = (None if part is None else int(part) for part in (found[1], found[3], found[5]))
    return slice(start, stop, step)


def _form() -> str:
    return "as 'down_proj: bits=8', 'layers[0:2].mlp: scheme=w8a16' or 'v: keep'; settings are " + ", ".join(_READERS)


def _flag(value: str) -> bool:
    return _FLAGS[value.lower()]


_READERS: Mapping[str, Callable[[str], Any]] = {
    "scheme": str,
    "bits": int,
    "group_size": int,
    "symmetric": _flag,
    "solver": str,
    "keep": _flag,
}
