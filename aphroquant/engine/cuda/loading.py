"""A model's weights and KV cache in the memory of the GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.engine.cuda.choice import GpuChoice
from aphroquant.engine.cuda.decoder import CudaDecoder
from aphroquant.engine.cuda.experts import PrepareGrouped
from aphroquant.engine.cuda.linears import Linear, Prepare
from aphroquant.engine.cuda.runner import CudaRunner
from aphroquant.engine.cuda.weights import DecoderWeights, load_weights
from aphroquant.engine.kv_cache import KVCache, KVScales
from aphroquant.engine.kv_scales import checkpoint_kv_scales
from aphroquant.engine.memory import plan_kv_blocks
from aphroquant.engine.types import EngineConfig
from aphroquant.errors import ResourceError, UsageError
from aphroquant.kernels.dispatch import PreparedGroupedLinear
from aphroquant.schemes import QuantizedWeight

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint
    from aphroquant.models.spec import DecoderSpec

logger = logging.getLogger(__name__)

BATCHED_TOKENS = 4096  # of a step: enough for the matrix units, and a decode step waits for no more
_RESERVE = 512 * 2**20  # for graphs, libraries' workspaces and fragmentation


def load_runner(config: EngineConfig, checkpoint: Checkpoint, gpu: GpuChoice) -> tuple[CudaRunner, KVCache, int]:
    """The runner, its cache, and max_model_len. ResourceError if the memory is too small."""
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        prepare_grouped = grouped_preparer(gpu.dtype)
        weights = load_weights(checkpoint, linear_preparer(gpu.dtype), device, gpu.dtype, prepare_grouped)
        needs_scales = "head" in (gpu.scheme.key.scaling, gpu.scheme.value.scaling)
        scales = checkpoint_kv_scales(checkpoint) if needs_scales else None
        runner, cache, max_model_len = place(config, checkpoint.spec, weights, gpu, scales)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ResourceError(
            f"{checkpoint.source}: the GPU's memory of {total / 2**30:.1f} GiB is too small for the weights, the KV "
            f"cache and the activations ({free / 2**30:.1f} GiB were free when it ran out)",
            hint="quantize to fewer bits, lower gpu_memory_utilization, max_num_seqs or max_num_batched_tokens, "
            "or run with --device cpu",
        ) from error
    logger.info("runner: cuda (%s)", gpu.reason)
    logger.info(
        "KV cache: %d tokens in %s, %.1f MiB; sequences of up to %d tokens",
        cache.capacity_tokens, gpu.scheme, cache.num_bytes / 2**20, max_model_len,
    )  # fmt: skip
    return runner, cache, max_model_len


def place(
    config: EngineConfig,
    spec: DecoderSpec,
    weights: DecoderWeights,
    gpu: GpuChoice,
    scales: Sequence[KVScales] | None,
) -> tuple[CudaRunner, KVCache, int]:
    """Put a KV cache beside loaded weights, in the memory that they leave, and capture the decode steps."""
    device = weights.embedding.device
    torch.cuda.empty_cache()  # what packing the weights left behind
    room = cache_room(config, spec, *torch.cuda.mem_get_info(device))
    num_blocks, max_model_len = plan_kv_blocks(config, spec, gpu.scheme, 0, room=room)
    cache = KVCache(spec, gpu.scheme, num_blocks, config.block_size, scales, device)
    decoder = CudaDecoder(
        spec, weights, gpu.scheme, block_size=config.block_size, max_positions=max_model_len, dtype=gpu.dtype
    )
    runner = CudaRunner(decoder, cache, max_num_seqs=config.max_num_seqs, max_model_len=max_model_len)
    return runner, cache, max_model_len


def linear_preparer(dtype: torch.dtype) -> Prepare:
    """Puts weights into the layout of their kernels on the current GPU."""
    from aphroquant.kernels.cuda.backend import prepare

    def prepared(weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        return prepare(weight, bias, dtype)

    return prepared


def grouped_preparer(dtype: torch.dtype) -> PrepareGrouped:
    """Puts the weights of a layer's experts into the layout of their kernels on the current GPU."""
    from aphroquant.kernels.cuda.backend import grouped_fallback_reason, prepare_grouped

    def prepared(weights: Sequence[QuantizedWeight]) -> PreparedGroupedLinear:
        if reason := grouped_fallback_reason(weights, dtype):
            raise UsageError(f"the GPU cannot run the experts: {reason}", hint="run with --device cpu")
        return prepare_grouped(weights, None, dtype)

    return prepared


def cache_room(config: EngineConfig, spec: DecoderSpec, free: int, total: int) -> int:
    """Bytes for the KV cache once the weights are loaded, so that a step of the largest batch still fits beside it."""
    unused = int((1 - config.gpu_memory_utilization) * total)
    return max(0, free - unused - activation_bytes(config, spec) - _RESERVE)


def activation_bytes(config: EngineConfig, spec: DecoderSpec) -> int:
    """A bound on what a step holds at once: rows of the widest layers, and logits with what sampling makes of them."""
    tokens = max(config.max_num_batched_tokens or BATCHED_TOKENS, config.max_num_seqs)
    heads = spec.num_heads + 2 * spec.num_kv_heads
    inner = spec.intermediate_size
    if spec.experts is not None:  # each of a token's experts makes its own, and an output
        inner = max(inner, spec.experts.top_k * (spec.experts.intermediate_size + spec.hidden_size))
    row = 4 * spec.hidden_size + 2 * (3 * spec.hidden_size + 3 * inner + 3 * heads * spec.head_dim)
    sampling = 8 * 4  # weights, order and running sums of a row of logits, some of them 8 bytes wide
    return tokens * row + config.max_num_seqs * spec.vocab_size * sampling
