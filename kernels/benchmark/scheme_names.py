"""Short names of schemes: w4g128, w8a8, fp8-block, nf4, aqlm-2x8, q4_k."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from aphroquant.errors import UsageError
from aphroquant.schemes import (
    ActivationScheme,
    AdditiveScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    Scheme,
)

_ROW = ActivationScheme("float")
_FIXED: dict[str, Callable[[], Scheme]] = {
    "bf16": lambda: DenseScheme(torch.bfloat16),
    "fp16": lambda: DenseScheme(torch.float16),
    "w8a8": lambda: IntegerScheme(8, None, True, activations=ActivationScheme("int")),
    "fp8": lambda: FloatScheme("channel", activations=_ROW),
    "fp8-tensor": lambda: FloatScheme(
        "tensor", activations=ActivationScheme("float", dynamic=False, granularity="tensor")
    ),
    "fp8-block": lambda: FloatScheme(
        "block", (128, 128), activations=ActivationScheme("float", granularity="group", group_size=128)
    ),
    "fp8-w8a16": lambda: FloatScheme("channel"),
    "nf4": lambda: LookupScheme("nf4", 64, "float"),
    "fp4": lambda: LookupScheme("fp4", 64, "float"),
    "mxfp4": lambda: LookupScheme("e2m1", 32, "e8m0"),
    "nvfp4": lambda: LookupScheme("e2m1", 16, "e4m3"),
    "aqlm-2x8": lambda: AdditiveScheme(2, 8, 1, 8),
    "aqlm-1x16": lambda: AdditiveScheme(1, 16, 1, 8),
    "q2_k": lambda: KQuantScheme("q2_k"),
    "q3_k": lambda: KQuantScheme("q3_k"),
    "q4_k": lambda: KQuantScheme("q4_k"),
    "q5_k": lambda: KQuantScheme("q5_k"),
    "q6_k": lambda: KQuantScheme("q6_k"),
    "q4_0": lambda: IntegerScheme(4, 32, True),
    "q4_1": lambda: IntegerScheme(4, 32, False, has_offsets=True),
    "q8_0": lambda: IntegerScheme(8, 32, True),
}
_INTEGER = re.compile(r"w([2-8])(?:a16)?(?:g(\d+))?(-asym)?(-act-order)?")


def scheme_of(name: str) -> Scheme:
    """The scheme of that name: one of the list, or wBITS[gGROUP][-asym][-act-order] for weight-only integers.

    Without a group size there is one scale a row. UsageError lists the names.
    """
    if name in _FIXED:
        return _FIXED[name]()
    if match := _INTEGER.fullmatch(name):
        bits, group, asymmetric, act_order = match.groups()
        size = int(group) if group else None
        return IntegerScheme(int(bits), size, symmetric=not asymmetric, act_order=bool(act_order))
    raise UsageError(
        f"scheme {name!r} must be wBITS[gGROUP][-asym][-act-order], or one of {', '.join(_FIXED)}",
        hint="for example --scheme w4g128, --scheme w8 or --scheme fp8-block",
    )
