"""Whether a model runs on the GPU, in what dtype, and why."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch

from aphroquant.engine.kv_cache import KVScheme
from aphroquant.engine.types import EngineConfig
from aphroquant.errors import UsageError

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


class GpuChoice(NamedTuple):
    """The dtype of activations, the formats of the KV cache, and the reason for the GPU."""

    dtype: torch.dtype
    scheme: KVScheme
    reason: str


def choose_gpu(config: EngineConfig, checkpoint: Checkpoint) -> GpuChoice | None:
    """None where the CPU runs the model: asked for, or because the GPU cannot. UsageError if only the GPU may."""
    if config.device == "cpu" or config.backend in ("reference", "cpu"):
        return None
    required = config.device == "cuda" or config.backend == "cuda"
    reason = gpu_obstacle()
    if reason is None:
        stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
        choice = gpu_choice(config, stored.removeprefix("torch."))
        reason = _shape_obstacle(choice, config, checkpoint)
        if reason is None:
            return choice
        if not required:
            logger.warning("the GPU is not used: %s", reason)
    if required:
        raise UsageError(f"device cuda cannot be used: {reason}", hint="leave out --device cuda to run on the CPU")
    return None


def gpu_obstacle() -> str | None:
    """Why no CUDA kernel runs here, or None."""
    if not torch.cuda.is_available():  # found without compiling anything
        return f"torch {torch.__version__} sees no GPU"
    from aphroquant.kernels.cuda.device import obstacle

    return obstacle()


def gpu_choice(config: EngineConfig, model_dtype: str) -> GpuChoice:
    """What the configuration says, and the model's dtype where it leaves that open."""
    own = "bfloat16" if model_dtype == "bfloat16" else "float16"
    dtype = torch.bfloat16 if (own if config.dtype == "auto" else config.dtype) == "bfloat16" else torch.float16
    scheme = KVScheme.named(own if config.kv_cache_dtype == "auto" else config.kv_cache_dtype)
    name = torch.cuda.get_device_name()
    return GpuChoice(dtype, scheme, f"{name} computes in {str(dtype).removeprefix('torch.')}")


def _shape_obstacle(choice: GpuChoice, config: EngineConfig, checkpoint: Checkpoint) -> str | None:
    from aphroquant.kernels.cuda.attention.shape import AttentionShape

    return AttentionShape.of(checkpoint.spec, choice.scheme, config.block_size).obstacle()
