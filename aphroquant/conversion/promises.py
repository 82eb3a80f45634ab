"""What a conversion will write, tensor by tensor in the order of writing, as far as its plan tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from aphroquant.checkpoint.shard import Promised
from aphroquant.conversion.plan import ConversionPlan
from aphroquant.conversion.repack import RepackPlan


def promised_tensors(plan: ConversionPlan | RepackPlan) -> Iterator[Promised]:
    """Quantized modules, a stack of them after its last entry, and what is carried over."""
    for modules, num_entries in _stacks(plan):
        stacked: dict[str, Promised] = {}
        for module in modules:
            for suffix, (dtype, shape) in plan.module_headers[module].items():
                name, entry = plan.format.place(module, suffix)
                if entry is None:
                    yield Promised(name, dtype, shape)
                else:
                    stacked[name] = Promised(name, dtype, (num_entries, *shape))
        yield from stacked.values()
    for name, (dtype, shape) in plan.dense_headers.items():
        yield Promised(name, dtype, shape)


def _stacks(plan: ConversionPlan | RepackPlan) -> Iterable[tuple[list[str], int]]:
    return plan.stacks if isinstance(plan, RepackPlan) else [(list(plan.modules), 0)]
