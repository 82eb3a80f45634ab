"""From how many tokens the kernel for batches is faster than the decode kernel, by the measured tables."""

from __future__ import annotations

from functools import lru_cache

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.integer.measured import DECODE, LOOKUP_DECODE, LOOKUP_WGMMA, WGMMA, kind_of
from aphroquant.kernels.cuda.tuning import Entry, Problem, load_table, nearest

FEW = 8  # tokens of one tile of the decode kernel: never slower with it
MANY = 16  # more are never faster with it


@lru_cache(maxsize=8192)
def batch_is_faster(
    bits: int, out_features: int, in_features: int, tokens: int, device: int, lookup: str | None = None
) -> bool:
    """Judged by the nearest product that was measured with both kernels; by MANY where there is none.

    `lookup`: of `kind_of_lookup`, for weights that are no integers.
    """
    if tokens <= FEW or tokens > MANY:
        return tokens > MANY
    found, kernels = gpu(device), (LOOKUP_DECODE, LOOKUP_WGMMA) if lookup else (DECODE, WGMMA)
    decode, batch = (load_table(name, found.name, found.architecture) for name in kernels)
    problem = Problem(lookup or kind_of(bits), out_features, in_features, MANY)
    times = {entry.problem: entry.microseconds for entry in batch}
    both: tuple[Entry, ...] = tuple(entry for entry in decode if entry.problem in times)
    entry = nearest(both, problem)
    return entry is not None and entry.problem.tokens == MANY and times[entry.problem] < entry.microseconds
