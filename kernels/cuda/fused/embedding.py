"""Rows of the embedding table as the float32 residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.kernels.cuda.fused.elements import element_macro, row_threads
from aphroquant.kernels.cuda.launcher import cuda_kernel


class FusedEmbedding:
    """table[token_ids] in float32, for a table [V, H] in bf16 or fp16."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._hidden_size = table.shape[1]
        self._threads = min(256, row_threads(self._hidden_size, items=1))
        macros = {"HIDDEN_SIZE": self._hidden_size, "THREADS": self._threads} | element_macro(table.dtype)
        self._kernel = cuda_kernel("fused_embedding.cu", "fused_embedding", macros)

    def __call__(self, token_ids: Tensor, *, programmatic: bool = False) -> Tensor:
        """int32 [T], each within the vocabulary -> float32 [T, H]."""
        num_rows = token_ids.shape[0]
        residual = torch.empty(num_rows, self._hidden_size, dtype=torch.float32, device=token_ids.device)
        if num_rows:
            self._kernel.launch(
                grid=(num_rows, 1, 1),
                block=(self._threads, 1, 1),
                args=[token_ids, self._table, residual],
                programmatic=programmatic,
            )
        return residual
