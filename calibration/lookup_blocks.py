"""Weights of lookup schemes as blocks that have a scale each."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.schemes import LookupScheme


def split_blocks(matrix: Tensor, scheme: LookupScheme) -> Tensor:
    """[N, K] -> [B, block size], float32, the last block (of each row, or of all) filled up with zeros."""
    size = scheme.block_size
    rows = matrix.float().reshape(1, -1) if scheme.flattened else matrix.float()
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % size)).reshape(-1, size)


def join_blocks(blocks: Tensor, scheme: LookupScheme, shape: tuple[int, int]) -> Tensor:
    """[B, block size] -> [N, K]; inverse of split_blocks."""
    num_rows, width = (1, shape[0] * shape[1]) if scheme.flattened else shape
    return blocks.reshape(num_rows, -1)[:, :width].reshape(shape)
