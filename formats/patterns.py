"""Regular expressions for modules, as `dynamic` of GPTQ has them.

Engines that multiply q, k and v (gate and up, all experts) as one layer look for that layer under a name of its own:
older releases of vLLM and SGLang never ask for its parts. A pattern for all parts therefore matches that name as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EXPERT = re.compile(r"(.+\.experts)\.\d+")


def exactly(modules: Sequence[str], others: Collection[str]) -> list[str]:
    """Patterns that match each of `modules`, none of `others`, and fused layers all of whose parts are `modules`."""
    parents: dict[str, list[str]] = {}
    for module in modules:
        parent, _, name = module.rpartition(".")
        parents.setdefault(parent, []).append(name)
    stacks: dict[str, dict[str, list[str]]] = {}
    patterns = []
    for parent, names in parents.items():
        if found := _EXPERT.fullmatch(parent):
            stacks.setdefault(found[1], {})[parent] = names
        else:
            fused = [name for name, parts in _FUSED.items() if set(parts) <= set(names)]
            patterns.append(_pattern(parent, [*names, *fused]))
    for stack, experts in stacks.items():
        patterns += _of_experts(stack, experts, others)
    return patterns


def _of_experts(stack: str, experts: dict[str, list[str]], others: Collection[str]) -> list[str]:
    """One pattern if all experts are alike, else one for each."""
    names = next(iter(experts.values()))
    alike = all(own == names for own in experts.values())
    rest = [module.rpartition(".")[2] for module in others if module.startswith(f"{stack}.")]
    if not alike or set(rest) & set(names):
        return [_pattern(parent, own) for parent, own in experts.items()]
    inner = rf"\.\d+\.(?:{'|'.join(map(re.escape, names))})"
    return [f"^{re.escape(stack)}{inner}$" if rest else f"^{re.escape(stack)}(?:{inner})?$"]


def _pattern(parent: str, names: Sequence[str]) -> str:
    prefix = f"^{re.escape(parent)}" + (r"\." if parent else "")
    return f"{prefix}{re.escape(names[0])}$" if len(names) == 1 else f"{prefix}(?:{'|'.join(map(re.escape, names))})$"
