"""Layers without a kernel of their own on the GPU: the weight is dequantized for every product, some rows at a time.

Right for every scheme, and slow: it reads and writes several bytes a weight where a kernel reads half of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.kernels.reference.linear import check_inputs, input_scheme, quantize_dequantize
from aphroquant.schemes import DenseScheme, QuantizedWeight
from aphroquant.schemes.rows import split_rows

PIECE = 1 << 24  # weights that are dequantized at once: 64 MB in float32


class DequantizingLinear:
    """y = x @ W.T + bias, the product in x's dtype with float32 sums."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device, piece: int = PIECE) -> None:
        self.out_features, self.in_features = weight.shape
        self._activations = input_scheme(weight.scheme)
        check_inputs(weight.scheme)
        tensors = {name: tensor.to(device) for name, tensor in weight.tensors.items()}
        whole = QuantizedWeight(weight.scheme, tensors, weight.shape)
        self._pieces = list(split_rows(whole, piece))
        self._bias = None if bias is None else bias.to(device)
        self._input_scale = tensors.get("input_scale")

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in x's dtype."""
        if self._activations is not None and x.shape[0]:
            x = quantize_dequantize(x.float(), self._activations, self._input_scale).to(x.dtype)
        y = x.new_empty(x.shape[0], self.out_features)
        start = 0
        for piece in self._pieces:
            stop = start + piece.shape[0]
            y[:, start:stop] = x @ piece.dequantize(x.dtype).T
            start = stop
        return y if self._bias is None else y.add_(self._bias.to(x.dtype))


class DenseLinear:
    """y = x @ W.T + bias through torch, for weights that are not quantized."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device) -> None:
        assert isinstance(weight.scheme, DenseScheme)
        self.out_features, self.in_features = weight.shape
        self._weight = weight["weight"].to(device)
        self._bias = None if bias is None else bias.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in x's dtype."""
        if self._weight.dtype != x.dtype:  # once: the engine keeps to one dtype
            self._weight = self._weight.to(x.dtype)
        bias = None if self._bias is None else self._bias.to(x.dtype)
        return torch.nn.functional.linear(x, self._weight, bias)
