"""Layers that engines multiply as one: q, k and v; gate and up; the experts of a block. They need one scheme."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from aphroquant.models.spec import GATE, UP, DecoderSpec, K, Q, V
from aphroquant.schemes import Scheme


def fused_groups(spec: DecoderSpec) -> Iterator[tuple[str, ...]]:
    """The modules of each group, in the order of execution. Modules that stand alone are in none."""
    for layer in range(spec.num_layers):
        prefix = spec.block_prefix(layer)
        yield tuple(f"{prefix}.{name}" for name in (Q, K, V))
        if spec.experts is None or not spec.has_experts(layer):
            yield tuple(f"{prefix}.{name}" for name in (GATE, UP))
            continue
        numbers = range(spec.experts.num_experts)
        yield tuple(f"{prefix}.{name}" for number in numbers for name in spec.experts.expert(number))


def unequal_groups(spec: DecoderSpec, schemes: Mapping[str, Scheme]) -> str | None:
    """One sentence about groups whose modules differ, those without a scheme being dense; None if there are none."""
    unequal = [group for group in fused_groups(spec) if len({schemes.get(module) for module in group}) > 1]
    if not unequal:
        return None
    first = unequal[0][0]
    other = next(module for module in unequal[0] if schemes.get(module) != schemes.get(first))
    return (
        f"{first} is {_text(schemes, first)} and {other} {_text(schemes, other)}, which vLLM, SGLang and kernels for "
        f"many experts multiply as one layer and refuse ({len(unequal)} such groups)"
    )


def _text(schemes: Mapping[str, Scheme], module: str) -> str:
    return str(schemes.get(module, "dense"))
