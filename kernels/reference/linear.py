"""Linear layers in plain torch: the weight dequantized once, the input rounded as its scheme says."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.kernels.reference.matmul import linear
from aphroquant.schemes import (
    ActivationScheme,
    FloatScheme,
    IntegerScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)
from aphroquant.schemes.tables import e8m0_exponents, table_of

E2M1_MAX = 6.0
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class ReferenceLinear:
    """y = x @ W.T + bias in float32."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._matrix = weight.dequantize()
        self._bias = None if bias is None else bias.float()
        self._activations = input_scheme(weight.scheme)
        check_inputs(weight.scheme)
        self._input_scale = weight.tensors.get("input_scale")

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in x's dtype."""
        rounded = x.float()
        if self._activations is not None:
            rounded = quantize_dequantize(rounded, self._activations, self._input_scale)
        return linear(rounded, self._matrix, self._bias).to(x.dtype)


def input_scheme(scheme: Scheme) -> ActivationScheme | None:
    """How the scheme quantizes inputs; None where it leaves them alone."""
    return scheme.activations if isinstance(scheme, IntegerScheme | FloatScheme | LookupScheme) else None


def check_inputs(scheme: Scheme) -> None:
    """InputError for a scheme whose inputs `quantize_dequantize` cannot round."""
    activations = input_scheme(scheme)
    is_microscaling = isinstance(scheme, LookupScheme) and scheme.scales in ("e4m3", "e8m0")
    if activations is None or activations.bits == 8 or (is_microscaling and _is_float4(activations)):
        return
    raise InputError(
        f"no kernel rounds inputs to {activations.bits}-bit {activations.kind}s ({scheme})",
        hint="convert the checkpoint to a weight-only scheme",
    )


def quantize_dequantize(x: Tensor, scheme: ActivationScheme, input_scale: Tensor | None = None) -> Tensor:
    """x [T, K] with the values that it has after quantization.

    A dynamic scale is absmax / 127 (8-bit integers) or absmax / 448 (FP8) of a row or a group. A dynamic scale for the
    whole tensor is taken for each row too: one shared by a batch would make a result depend on its neighbours.
    Four-bit floats have a scale for each group: an e4m3 number times `input_scale` that makes the largest magnitude a
    6 (NVFP4), or without an `input_scale` a power of two (MXFP4).
    """
    width = scheme.group_size or x.shape[1]
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % width)).view(x.shape[0], -1, width)  # [T, G, width]
    if _is_float4(scheme):
        return _rounded_float4(groups, input_scale).view(x.shape[0], -1)[:, : x.shape[1]]
    top = FP8_MAX if scheme.kind == "float" else 2.0 ** (scheme.bits - 1) - 1
    if scheme.dynamic:
        largest = groups.abs().amax(-1, keepdim=True)
        scale = largest / torch.full_like(largest, top)  # by a plain number, torch on a GPU multiplies by its inverse
    else:
        scale = _static(input_scale)
    codes = groups / torch.where(scale == 0, 1.0, scale)
    if scheme.kind == "float":
        codes = codes.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    else:
        codes = codes.clamp(-top - 1, top).round()
    return (codes * scale).view(x.shape[0], -1)[:, : x.shape[1]]


def _is_float4(scheme: ActivationScheme) -> bool:
    return scheme.kind == "float" and scheme.bits == 4 and scheme.granularity == "group"


def _rounded_float4(groups: Tensor, input_scale: Tensor | None) -> Tensor:
    """Groups [T, G, n] with the values of e2m1 codes."""
    largest = groups.abs().amax(-1, keepdim=True)
    if input_scale is None:
        scale = torch.ldexp(torch.ones_like(largest), e8m0_exponents(largest))
    else:
        common = input_scale.float()
        scale = (largest / E2M1_MAX / common).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float() * common
    return table_of("e2m1", groups.device).nearest(groups / torch.where(scale == 0, 1.0, scale)) * scale


def _static(input_scale: Tensor | None) -> Tensor:
    assert input_scale is not None, "a static activation scheme comes with an input_scale"
    return input_scale.float()
