"""The decoder's forward on the device: one sequence of launches, for eager steps and for capture alike."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from aphroquant.engine.cuda.experts import Experts
from aphroquant.engine.cuda.linears import Linear, codes_linear
from aphroquant.engine.cuda.metadata import StepInputs
from aphroquant.engine.cuda.weights import DecoderWeights, LayerWeights, MlpWeights
from aphroquant.engine.kv_cache import KVCache, KVScheme
from aphroquant.kernels.cuda.attention.decode import DecodeWorkspace, PagedDecode
from aphroquant.kernels.cuda.attention.prefill import PagedPrefill
from aphroquant.kernels.cuda.attention.shape import AttentionShape
from aphroquant.kernels.cuda.fused.elements import OutputFormat, Quantized
from aphroquant.kernels.cuda.fused.embedding import FusedEmbedding
from aphroquant.kernels.cuda.fused.gated_activation import FusedGatedActivation
from aphroquant.kernels.cuda.fused.rms_norm import FusedRmsNorm
from aphroquant.kernels.cuda.fused.rotary_cache import FusedRotaryCache, HeadNorms
from aphroquant.models.rope import cos_sin
from aphroquant.models.spec import DecoderSpec


class CudaDecoder:
    """Activations are bf16 or fp16, the residual stream, sums and logits float32."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        scheme: KVScheme,
        *,
        block_size: int,
        max_positions: int,
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.weights = spec, weights
        self.shape = AttentionShape.of(spec, scheme, block_size)
        self.device = weights.embedding.device
        scale = spec.head_dim**-0.5
        self._dtype = dtype
        self._embed = FusedEmbedding(weights.embedding)
        self._norm = FusedRmsNorm(spec.hidden_size, spec.norm_eps, dtype)
        self._activation = FusedGatedActivation(spec.intermediate_size, dtype)
        if any(codes_linear(linear) for layer in weights.layers for linear in _code_layers(layer)):
            self._code_norm = FusedRmsNorm(spec.hidden_size, spec.norm_eps, dtype, OutputFormat.FLOAT8)
            self._code_activation = FusedGatedActivation(spec.intermediate_size, dtype, output=OutputFormat.FLOAT8)
        self._rotary = FusedRotaryCache(self.shape, dtype, has_norm=spec.qk_norm)
        self.decode_attention = PagedDecode(self.shape, dtype, scale)
        self.prefill_attention = PagedPrefill(self.shape, dtype, scale)
        # made on the host: the same numbers as the other runners have
        cos, sin = cos_sin(spec.rope, spec.head_dim, torch.arange(max_positions))
        self._cos_sin = (cos.contiguous().to(self.device), sin.contiguous().to(self.device))

    def forward(self, inputs: StepInputs, cache: KVCache, workspace: DecodeWorkspace) -> Tensor:
        """Stores the tokens' keys and values; float32 logits of the rows that need them, [R, V]."""
        residual = self._embed(inputs.token_ids, programmatic=True)  # float32 [T, H]
        delta: Tensor | None = None
        for number, layer in enumerate(self.weights.layers):
            qkv = self._normed_product(layer.qkv, residual, delta, layer.input_norm)
            mixed = self._attention(qkv, inputs, cache, workspace, number, layer)
            delta = layer.o(mixed.view(inputs.num_tokens, -1))
            delta = self._mlp(layer.mlp, residual, delta, layer.post_attention_norm)
        last = self._normed(residual, delta, self.weights.final_norm, inputs.logits_rows)  # [R, H]
        return self.weights.head(last)

    def _mlp(self, mlp: MlpWeights | Experts, residual: Tensor, delta: Tensor, gain: Tensor) -> Tensor:
        if isinstance(mlp, Experts):
            return mlp(self._normed(residual, delta, gain))
        return self._activated_product(mlp.down, self._normed_product(mlp.gate_up, residual, delta, gain))

    def _normed(self, residual: Tensor, delta: Tensor | None, gain: Tensor, rows: Tensor | None = None) -> Tensor:
        return cast(Tensor, self._norm(residual, delta, gain, rows=rows, programmatic=True))

    def _normed_product(self, linear: Linear, residual: Tensor, delta: Tensor | None, gain: Tensor) -> Tensor:
        if (by_codes := codes_linear(linear)) is None:
            return linear(self._normed(residual, delta, gain))
        x = cast(Quantized, self._code_norm(residual, delta, gain, programmatic=True))
        return by_codes.multiply_codes(x.codes, x.scales, self._dtype)

    def _activated_product(self, linear: Linear, gate_up: Tensor) -> Tensor:
        if (by_codes := codes_linear(linear)) is None:
            return linear(cast(Tensor, self._activation(gate_up, programmatic=True)))
        x = cast(Quantized, self._code_activation(gate_up, programmatic=True))
        return by_codes.multiply_codes(x.codes, x.scales, self._dtype)

    def _attention(
        self,
        qkv: Tensor,
        inputs: StepInputs,
        cache: KVCache,
        workspace: DecodeWorkspace,
        number: int,
        layer: LayerWeights,
    ) -> Tensor:
        """[T, (heads + 2 kv heads) * d] -> [T, heads, d]."""
        own = cache.layer(number)
        window = self.spec.sliding_windows[number]
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = HeadNorms(layer.q_norm, layer.k_norm, self.spec.norm_eps)
        queries = self._rotary(qkv, inputs.positions, inputs.slots, self._cos_sin, own, norms=norms, programmatic=True)
        mixed = torch.empty_like(queries)
        count = inputs.num_decoding
        if count:
            self.decode_attention(
                queries[:count],
                own,
                inputs.block_tables[:count],
                inputs.context_lens[:count],
                workspace,
                splits=inputs.splits,
                output=mixed[:count],
                sliding_window=window,
                programmatic=True,
            )
        if inputs.tiles is not None:
            assert inputs.query_start is not None
            self.prefill_attention(
                queries,
                mixed,
                own,
                inputs.block_tables,
                inputs.context_lens,
                inputs.query_start,
                inputs.tiles,
                sliding_window=window,
                programmatic=True,
            )
        return mixed


def _code_layers(layer: LayerWeights) -> tuple[Linear, ...]:
    """Those whose inputs this decoder computes, and so may quantize."""
    if isinstance(layer.mlp, Experts):
        return (layer.qkv,)
    return layer.qkv, layer.mlp.gate_up, layer.mlp.down
