"""The kinds of weights with plans of their own, each with a scheme that is measured for all of its kind."""

from __future__ import annotations

from functools import cache

from aphroquant.kernels.cuda.integer.measured import kind_of_lookup
from aphroquant.kernels.cuda.integer.packing import ROWS
from aphroquant.kernels.cuda.lookup.linear import pack_any
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import KQuantScheme, LookupScheme, Scheme

_COLUMNS = 256
_SCHEMES: tuple[Scheme, ...] = (
    LookupScheme("nf4", 64, "nested", flattened=True),
    LookupScheme("e2m1", 32, "e8m0"),
    LookupScheme("e2m1", 16, "e4m3"),
    KQuantScheme("q2_k"),
    KQuantScheme("q3_k"),
    KQuantScheme("q4_k"),
    KQuantScheme("q5_k"),
    KQuantScheme("q6_k"),
)


@cache
def schemes_by_kind() -> dict[str, Scheme]:
    """The schemes by the kind that measured tables have them under."""
    found: dict[str, Scheme] = {}
    for scheme in _SCHEMES:
        kind = kind_of_lookup(pack_any(random_weight(scheme, ROWS, _COLUMNS), "cpu"))
        assert kind is not None
        found[kind] = scheme
    return found
