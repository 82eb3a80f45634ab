"""The Gram matrix of activations: what second moments are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.kernels.reference.matmul import linear

_GRAM_BLOCKS = 4  # the triangle above the diagonal then costs 10 of 16 products


def gram(x: Tensor) -> Tensor:
    """x.T @ x [K, K] of x [T, K], exactly symmetric; only the blocks on and above the diagonal are computed."""
    width = x.shape[1]
    columns = x.T.contiguous()  # [K, T]
    result = torch.empty(width, width, dtype=x.dtype, device=x.device)
    step = -(-width // _GRAM_BLOCKS) if width >= 256 else max(width, 1)
    for start in range(0, width, step):
        rows = columns[start : start + step]
        block = linear(rows, columns[start:])  # [step, K - start]
        result[start : start + step, start:] = block
        result[start:, start : start + step] = block.T
    return result
