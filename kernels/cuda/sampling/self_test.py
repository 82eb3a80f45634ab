"""Sampling on the GPU against the distribution that it draws from."""

from __future__ import annotations

import torch

from aphroquant.kernels.cuda.sampling.draws import TokenDraw
from aphroquant.kernels.cuda.sampling.tokens import sample_tokens
from aphroquant.kernels.cuda.self_test import SelfTest

_COUNT = 2000


def _share_error() -> float:
    """Draws at even positions have the probabilities as their shares."""
    logits = torch.randn(1, 50, device="cuda")
    draws = [TokenDraw((index + 0.5) / _COUNT, temperature=0.8) for index in range(_COUNT)]
    tokens = sample_tokens(logits.expand(_COUNT, 50).contiguous(), draws).tokens
    shares = torch.bincount(tokens, minlength=50).double() / _COUNT
    expected = (logits[0].double() / 0.8).softmax(0)
    return float((shares - expected).norm() / expected.norm())


def _greedy_error() -> float:
    """The share of rows whose token is not the likeliest."""
    logits = torch.randn(20, 3001, device="cuda")
    tokens = sample_tokens(logits, [TokenDraw()] * 20).tokens
    return float((tokens != logits.argmax(-1)).double().mean())


SELF_TESTS = (
    SelfTest("sampling: shares of draws", _share_error, 1e-2),
    SelfTest("sampling: the likeliest token", _greedy_error, 0.0),
)
