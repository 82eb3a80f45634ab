"""Dense products in float32 on a CPU: the fastest routine that torch was built with.

On x86 CPUs torch sends float32 products to MKL, which picks narrower instructions than oneDNN on processors of other
makers: measured with torch 2.13 on two cores of an AMD EPYC (Zen 5), 200 against 420 Gflop/s at 4096 x 576 x 1536.
oneDNN is taken where torch has it, `torch.nn.functional.linear` otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _has_onednn()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] @ weight [N, K].T + bias [N] -> [T, N]."""
    if _ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)
