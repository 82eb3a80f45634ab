"""Prepared layers as an operator of torch, so that torch.compile and export see one call with a known shape."""

from __future__ import annotations

import itertools
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from aphroquant.kernels.dispatch import PreparedLinear

_layers: WeakValueDictionary[int, RegisteredLinear] = WeakValueDictionary()
_numbers = itertools.count()


class RegisteredLinear:
    """A prepared layer that runs at once in eager code, and as `aphroquant::linear` in compiled code."""

    def __init__(self, layer: PreparedLinear) -> None:
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.number = next(_numbers)
        _layers[self.number] = self

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in x's dtype."""
        if torch.compiler.is_compiling():
            result: Tensor = torch.ops.aphroquant.linear(x, self.number, self.out_features)
            return result
        return self.layer(x)


@torch.library.custom_op("aphroquant::linear", mutates_args=())
def linear(x: Tensor, number: int, out_features: int) -> Tensor:
    """The product of the registered layer of that number."""
    layer = _layers.get(number)
    if layer is None:
        raise RuntimeError(f"the layer {number} of aphroquant::linear is gone: keep the model that was compiled")
    return layer.layer(x)


@linear.register_fake
def _(x: Tensor, number: int, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)
