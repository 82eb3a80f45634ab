"""Weights that make up for drift: for what the layers already rounded have changed in a layer's input.

A layer that sees x in the quantized model where the source has x_s, and whose output is added to states h in place of
h_s, is best replaced by the W' that brings W' x nearest to W x_s + (h_s - h).What is missing is known of some
tokens F; there W' is fitted by least squares, with a penalty for what it changes in the outputs of all tokens, as the
errors of the calibration text are not quite those of other texts:

    W' = W + M (H_F + r H)^-1,    M = E_F[(W x_s + h_s - W x - h) x^T],    H = E[x x^T],    H_F = E_F[x x^T],

where M = W E_F[(x_s - x) x^T] if the output is not added to anything. If F are all tokens, that is a share 1 / (1 + r)
of the least-squares solution (GPTAQ, arXiv 2504.02692, and QEP, arXiv 2504.09629, do the like with shares of 1/4 to 1;
neither looks at the states). H_F must be in it: where tokens of F are larger than most, M H^-1 goes far beyond what is
missing, and from block to block farther.

Measured with the first five blocks of SmolLM2-135M rounded and the others left alone (off its grid, groups of 64 with
zero points, calibration and drift by 24 x 512 tokens of speeches; mean KL divergence on 1,536 tokens each): at 2 bits
0.524 without and 0.396 with it on Wikipedia, 1.24 and 1.02 on documentation; at 3 bits 0.090 without, and 0.077 and
0.082 in two runs with it on Wikipedia; at 4 bits nothing (0.0325 and 0.0330 on 6,144 tokens of both). Weighting tokens
by 1 / |h|^2, as the next norm does, changed nothing (0.090).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.calibration.gptq import DAMPING
from aphroquant.calibration.gram import gram
from aphroquant.kernels.reference.matmul import linear

SHARE = 0.5


class Drift:
    """Sums over tokens of something missing times x^T, of inputs or of one layer's outputs, and of x x^T."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._sum: Tensor | None = None  # [M, K]
        self._moment: Tensor | None = None  # [K, K]

    def add(self, missing: Tensor, x: Tensor) -> None:
        """Of missing [T, M] and the quantized model's inputs x [T, K]."""
        product, moment = linear(missing.T.contiguous(), x.T.contiguous()), gram(x)
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._moment = moment if self._moment is None else self._moment.add_(moment)
        self._num_tokens += x.shape[0]

    def by_inputs(self, weights: Sequence[Tensor], moment: Tensor, *, share: float = SHARE) -> list[Tensor]:
        """W' of weights [N, K] where x_s - x was missing, with H [K, K]; as they are where H cannot be used."""
        mean = self._mean()
        return self._solved(weights, [linear(weight, mean.T.contiguous()) for weight in weights], moment, share)

    def by_outputs(self, weight: Tensor, moment: Tensor, *, share: float = SHARE) -> Tensor:
        """W' of the weight [N, K] whose outputs, and the states that they are added to, were missing."""
        return self._solved([weight], [self._mean()], moment, share)[0]

    def _mean(self) -> Tensor:
        assert self._sum is not None
        return self._sum / self._num_tokens

    def _solved(
        self, weights: Sequence[Tensor], missing: Sequence[Tensor], moment: Tensor, share: float
    ) -> list[Tensor]:
        assert self._moment is not None
        penalized = self._moment / self._num_tokens + moment * (1 / share - 1)
        penalized.diagonal().add_(DAMPING * penalized.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(penalized)
        if int(failed) or not torch.isfinite(lower).all():
            return list(weights)
        change = torch.cholesky_solve(torch.cat(list(missing)).T, lower).T
        if not torch.isfinite(change).all():
            return list(weights)
        parts = torch.split(change, [weight.shape[0] for weight in weights])
        return [weight + part for weight, part in zip(weights, parts, strict=True)]
