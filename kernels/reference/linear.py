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

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class ReferenceLinear:
    """y = x @ W.T + bias in float32."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._matrix = weight.dequantize()
        self._bias = None if bias is None else bias.float()
        self._activations = input_scheme(weight.scheme)
        if self._activations is not None and self._activations.bits != 8:
            raise InputError(
                f"no kernel rounds inputs to {self._activations.bits}-bit {self._activations.kind}s ({weight.scheme})",
                hint="convert the checkpoint to a weight-only scheme",
            )
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


def quantize_dequantize(x: Tensor, scheme: ActivationScheme, input_scale: Tensor | None = None) -> Tensor:
    """x [T, K] with the values that it has after quantization.

    A dynamic scale is absmax / 127 (8-bit integers) or absmax / 448 (FP8) of a row or a group. A dynamic scale for the
    whole tensor is taken for each row too: one shared by a batch would make a result depend on its neighbours.
    """
    width = scheme.group_size or x.shape[1]
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % width)).view(x.shape[0], -1, width)  # [T, G, width]
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


def _static(input_scale: Tensor | None) -> Tensor:
    assert input_scale is not None, "a static activation scheme comes with an input_scale"
    return input_scale.float()
