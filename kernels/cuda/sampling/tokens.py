"""One token for each row of logits, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int32

import numpy as np
import torch
from torch import Tensor

from aphroquant.kernels.cuda.launcher import cuda_kernel
from aphroquant.kernels.cuda.sampling.draws import TokenDraw

MAX_THREADS = 1024
_RECORD = np.dtype(
    [("position", "<f8"), ("temperature", "<f4"), ("top_p", "<f4"), ("min_p", "<f4"), ("top_k", "<i4")]
)  # `Draw` of sample_tokens.cu


def sample_tokens(logits: Tensor, draws: Sequence[TokenDraw], rows: Sequence[int] | None = None) -> Tensor:
    """int64 [R]: a token for each of `draws`, -1 where a logit is NaN or the largest is not finite.

    Logits are float32 [N, V]; draw i belongs to row `rows[i]`, or to row i.
    """
    threads = min(MAX_THREADS, -(-logits.shape[1] // 128) * 32)  # about 4 tokens a thread, if there are so few
    kernel = cuda_kernel("sample_tokens.cu", "sample_tokens", {"THREADS": threads})
    tokens = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    if not draws:
        return tokens
    records = None
    if any(draw.temperature for draw in draws):
        packed = np.array(draws, dtype=_RECORD).view(np.uint8)
        records = torch.from_numpy(packed).to(logits.device, non_blocking=True)
    indices = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=logits.device)
    kernel.launch(
        grid=(len(draws), 1, 1),
        block=(threads, 1, 1),
        args=[logits, indices, records, tokens, c_int32(logits.shape[1])],
    )
    return tokens
