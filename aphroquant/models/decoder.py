"""The decoder forward, once, for calibration, evaluation and the reference engine.

Tokens are packed: hidden states are [T, H] whatever sequences they belong to. What differs between users is how the
tokens attend, so attention is passed in: full causal attention over fixed windows in calibration, paged attention in
the engine. Linears are plain callables in a dict, so that a caller may record, replace or quantize any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.reference.grouped import combine, group_tokens
from aphroquant.models.rope import rotate
from aphroquant.models.spec import (
    DOWN,
    GATE,
    INPUT_NORM,
    K_NORM,
    POST_ATTENTION_NORM,
    Q_NORM,
    UP,
    DecoderSpec,
    K,
    O,
    Q,
    V,
)  # fmt: skip

Linear = Callable[[Tensor], Tensor]  # [T, K] -> [T, N]
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # q [T, heads, d], k, v [T, kv heads, d], layer -> like q
CosSin = tuple[Tensor, Tensor]


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in at least float32."""
    work = x if x.dtype == torch.float64 else x.float()
    normed = work * torch.rsqrt(work.pow(2).mean(-1, keepdim=True) + eps)
    return (gain.to(normed.dtype) * normed).to(x.dtype)


@dataclass
class DecoderBlock:
    """One transformer block. `linears` and `norms` are keyed by the names in aphroquant.models.spec.

    `router` gives the logits of the experts, in a block that has them.
    """

    spec: DecoderSpec
    layer: int
    linears: dict[str, Linear]
    norms: dict[str, Tensor]
    router: Linear | None = None

    def forward(self, hidden: Tensor, rope: CosSin, attend: Attend) -> Tensor:
        """[T, H] -> [T, H]."""
        hidden = hidden + self.attention(self.norm(INPUT_NORM, hidden), rope, attend)
        return hidden + self.mlp(self.norm(POST_ATTENTION_NORM, hidden))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.norms[name], self.spec.norm_eps)

    def attention(self, x: Tensor, rope: CosSin, attend: Attend) -> Tensor:
        """Self attention of the normed input x [T, H]."""
        spec = self.spec
        q = self.linears[Q](x).view(-1, spec.num_heads, spec.head_dim)
        k = self.linears[K](x).view(-1, spec.num_kv_heads, spec.head_dim)
        v = self.linears[V](x).view(-1, spec.num_kv_heads, spec.head_dim)
        if spec.qk_norm:
            q, k = self.norm(Q_NORM, q), self.norm(K_NORM, k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        mixed = attend(q, k, v, self.layer)
        return self.linears[O](mixed.reshape(-1, spec.num_heads * spec.head_dim))

    def mlp(self, x: Tensor) -> Tensor:
        """Gated MLP, or the experts, of the normed input x [T, H]."""
        if self.router is not None:
            return self.experts(x)
        return self.linears[DOWN](torch.nn.functional.silu(self.linears[GATE](x)) * self.linears[UP](x))

    def experts(self, x: Tensor) -> Tensor:
        """The weighted sums [T, H] of each token's experts."""
        experts = self.spec.experts
        assert experts is not None
        weights, ids = self.choose(x)
        groups = group_tokens(ids, experts.num_experts)
        y, ends, rows = x.new_empty(groups.num_pairs, x.shape[1]), groups.offsets.tolist(), groups.rows.long()
        for number in range(experts.num_experts):
            start, end = ends[number], ends[number + 1]
            if start < end:
                down = self.linears[experts.expert(number)[2]]
                y[start:end] = down(self.expert_inner(number, x[rows[start:end]]))
        return combine(y, groups.places, weights)

    def expert_inner(self, number: int, x: Tensor) -> Tensor:
        """The input [T, I] of an expert's down projection for its inputs x [T, H]."""
        assert self.spec.experts is not None
        gate, up, _ = self.spec.experts.expert(number)
        return torch.nn.functional.silu(self.linears[gate](x)) * self.linears[up](x)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights [T, k] of each token's experts, and their numbers."""
        experts = self.spec.experts
        assert experts is not None and self.router is not None
        logits = self.router(x)
        shares = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
        weights, ids = shares.topk(experts.top_k)
        if experts.normalizes:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids


def causal_attention(spec: DecoderSpec, window_len: int) -> Attend:
    """Attention for packed tokens that are whole windows of `window_len` tokens each, [B * window_len, ...]."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        batch = q.shape[0] // window_len
        q, k, v = (t.view(batch, window_len, -1, spec.head_dim).transpose(1, 2) for t in (q, k, v))  # [B, heads, S, d]
        sliding = spec.sliding_windows[layer]
        mask = None
        if sliding is not None and sliding < window_len:
            distance = torch.arange(window_len)[:, None] - torch.arange(window_len)[None, :]
            mask = ((distance >= 0) & (distance < sliding)).to(q.device)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=spec.num_heads != spec.num_kv_heads
        )
        return mixed.transpose(1, 2).reshape(batch * window_len, -1, spec.head_dim)

    return attend
