"""A plan in words, one fact a line."""

from __future__ import annotations

from collections.abc import Iterator

from aphroquant.checkpoint.disk import size_text
from aphroquant.planning.plan import OutputPlan, Plan
from aphroquant.planning.serving import Capacity


def plan_text(plan: Plan) -> str:
    """The whole plan."""
    sections = ["\n".join(_aligned(dict(_facts(output, plan.tensor_parallel)))) for output in plan.outputs]
    return "\n\n".join([*sections, "\n".join(_aligned(dict(_work(plan))))])


def _facts(output: OutputPlan, ranks: int) -> Iterator[tuple[str, str]]:
    share = f" ({output.num_bytes / output.source_bytes:.1%} of the source's)" if output.source_bytes else ""
    yield "output", f"{output.name}: {output.to}, {output.scheme}"
    yield "numbers", output.outcome
    yield "size", f"{size_text(output.num_bytes)} of tensors{share}, {size_text(output.file_bytes)} in all"
    yield "layers", f"{output.num_modules} quantized, {output.bits_per_weight:.3f} bits a weight, scales included"
    engines = [f"{name} ({known})" if known else name for name, known in output.engines.items()]
    yield "loads in", ", ".join(engines)
    if output.fused:
        yield "fused layers", output.fused
    if ranks > 1:
        yield f"on {ranks} GPUs", "; ".join(output.undivided) or "every layer divides"
    for place in output.capacities:
        yield place.gpu + (f" x {place.ranks}" if place.ranks > 1 else ""), _capacity(place)
    for number, note in enumerate(output.notes, 1):
        yield f"note {number}", note
    for number, warning in enumerate(output.warnings, 1):
        yield f"warning {number}", warning


def _capacity(place: Capacity) -> str:
    if not place.fits:
        return "does not fit"
    told = " or ".join(f"{count:,} tokens of KV cache in {name}" for name, count in place.kv_tokens.items())
    return f"{told}; at most {place.tokens_per_second:,.0f} tokens/s a request by its bandwidth"


def _work(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "disk", f"{size_text(plan.disk_bytes)} for all outputs"
    if plan.estimate is None:
        yield "time, memory", f"unknown: {plan.no_estimate}"
        return
    found = plan.estimate
    but = f"; without {found.left_out}" if found.left_out else ""
    tried = sum(trial.whole.seconds for trial in dict.fromkeys(found.trials))
    cpu = _duration(found.cpu_seconds)
    yield "time", f"{_duration(found.seconds)} on this machine as it is now, {cpu} of processors{but}"
    yield "measured in", f"{tried:.0f} s, on the first blocks"
    yield "memory", f"{found.peak_bytes / 2**20:,.0f} MiB at most"
    if found.gpu_bytes:
        yield "GPU memory", f"{found.gpu_bytes / 2**20:,.0f} MiB at most"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _aligned(facts: dict[str, str]) -> Iterator[str]:
    width = max(map(len, facts))
    return (f"{name:<{width}}  {value}" for name, value in facts.items())
