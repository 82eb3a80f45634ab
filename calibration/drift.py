"""Weights that make up for drift: for what the layers already rounded have changed in a layer's input.

A layer that sees x in the quantized model where the source has x_s, and whose output is added to states h in place of
h_s, is best replaced by the W' that brings W' x nearest to W x_s + (h_s - h). By least squares

    W' = W + (W D + O) H^-1,    H = E[x x^T],  D = E[(x_s - x) x^T],  O = E[(h_s - h) x^T].

Only a share of that is taken, as the errors of the calibration text are not quite those of other texts (GPTAQ, arXiv
2504.02692, and QEP, arXiv 2504.09629, do the like with shares of 1/4 to 1; neither corrects the states).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.calibration.gptq import factorize
from aphroquant.kernels.reference.matmul import linear

SHARE = 0.5


class Drift:
    """Sums over tokens of D and, where states are given, O."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._inputs: Tensor | None = None  # [K, K]
        self._states: Tensor | None = None  # [H, K]

    def add(self, source: Tensor, x: Tensor, states: Tensor | None = None) -> None:
        """Inputs [T, K] of the source and of the quantized model, and h_s - h [T, H]."""
        columns = x.T.contiguous()
        self._inputs = _added(self._inputs, (source - x).T, columns)
        if states is not None:
            self._states = _added(self._states, states.T, columns)
        self._num_tokens += x.shape[0]

    def corrected(self, weights: Sequence[Tensor], moment: Tensor, *, share: float = SHARE) -> list[Tensor]:
        """W' of weights [N, K] with these inputs of second moment H [K, K]; as they are where H cannot be used."""
        factor = factorize(moment)
        if factor is None or self._inputs is None:
            return list(weights)
        order, upper = factor.order, factor.upper
        found = []
        for weight in weights:
            pulled = linear(weight, self._inputs.T.contiguous())  # W D
            if self._states is not None:
                pulled = pulled + self._states
            half = linear(pulled[:, order] * (share / self._num_tokens), upper)
            change = torch.empty_like(weight)
            change[:, order] = linear(half, upper.T.contiguous())  # H^-1 = U^T U
            found.append(weight + change if torch.isfinite(change).all() else weight)
        return found


def _added(total: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
    product = linear(rows.contiguous(), columns)
    return product if total is None else total.add_(product)
