"""What is wrong with a request whatever its source is. A recipe is told of it without a source."""

from __future__ import annotations

from aphroquant.conversion.gguf_types import resolve_types
from aphroquant.conversion.kv_cache import check_kv_scales_asked
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.targets import can_be_quantized_for, resolve_scheme, resolve_solver


def check_asked(request: ConversionRequest) -> None:
    """UsageError for a scheme, bits, solver or scales of a cache that the target does not go with."""
    if request.to == "gguf":
        resolve_types(request)
        return
    if can_be_quantized_for(request.to):
        resolve_solver(request, resolve_scheme(request, {}))
    check_kv_scales_asked(request)
