"""One token for each row of logits, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int32
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aphroquant.kernels.cuda.host_copies import to_device
from aphroquant.kernels.cuda.launcher import cuda_kernel
from aphroquant.kernels.cuda.sampling.draws import TokenDraw

MAX_THREADS = 1024
_RECORD = np.dtype(
    [("position", "<f8"), ("temperature", "<f4"), ("top_p", "<f4"), ("min_p", "<f4"), ("top_k", "<i4")]
)  # `Draw` of sample_tokens.cu


class SampledTokens(NamedTuple):
    """`tokens` int64 [R]: -1 where a logit is NaN or the largest is not finite; `next` int32 [R] has 0 there."""

    tokens: Tensor
    next: Tensor


def sample_tokens(logits: Tensor, draws: Sequence[TokenDraw], rows: Sequence[int] | None = None) -> SampledTokens:
    """A token for each of `draws`. Waits for nothing.

    Logits are float32 [N, V]; draw i belongs to row `rows[i]`, or to row i.
    """
    threads = min(MAX_THREADS, -(-logits.shape[1] // 128) * 32)  # about 4 tokens a thread, if there are so few
    kernel = cuda_kernel("sample_tokens.cu", "sample_tokens", {"THREADS": threads})
    device = logits.device
    sampled = SampledTokens(
        torch.empty(len(draws), dtype=torch.int64, device=device),
        torch.empty(len(draws), dtype=torch.int32, device=device),
    )
    if not draws:
        return sampled
    records = None
    if any(draw.temperature for draw in draws):
        packed = np.array(draws, dtype=_RECORD).view(np.uint8)
        records = to_device(torch.from_numpy(packed), device)
    indices = None if rows is None else to_device(torch.tensor(rows, dtype=torch.int32), device)
    kernel.launch(
        grid=(len(draws), 1, 1),
        block=(threads, 1, 1),
        args=[logits, indices, records, sampled.tokens, sampled.next, c_int32(logits.shape[1])],
    )
    return sampled
