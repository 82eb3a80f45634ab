"""From a checkpoint to a model that is ready to run: KV cache, runner, tokenizer, limits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.engine.cuda.choice import GpuChoice, choose_gpu
from aphroquant.engine.kv_cache import KVCache, KVScheme
from aphroquant.engine.kv_scales import checkpoint_kv_scales
from aphroquant.engine.memory import plan_kv_blocks
from aphroquant.engine.runner import Runner, RunnerChoice, choose_runner, make_runner
from aphroquant.engine.types import EngineConfig
from aphroquant.errors import InputError, ResourceError, is_out_of_memory

if TYPE_CHECKING:
    from aphroquant.models.spec import DecoderSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """What an engine drives. `ending_tokens` are those that end an answer (end of text, end of turn)."""

    runner: Runner
    runner_choice: RunnerChoice
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    num_kv_blocks: int
    max_model_len: int
    ending_tokens: frozenset[int]
    batched_tokens: int = 512  # of a step, unless the configuration says


def load_model(config: EngineConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> LoadedModel:
    """Open the checkpoint, size and allocate the KV cache, load the weights."""
    checkpoint = open_checkpoint(config.model)
    spec = checkpoint.spec
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if (gpu := choose_gpu(config, checkpoint)) is not None:
        return _load_on_gpu(config, checkpoint, gpu, tokenizer)
    scheme = KVScheme.named(_kv_dtype(config.kv_cache_dtype, checkpoint.config))
    choice = choose_runner(checkpoint, config.backend)
    num_blocks, max_model_len = plan_kv_blocks(config, spec, scheme, _weight_bytes(choice, checkpoint))
    tokenizer = tokenizer or checkpoint.tokenizer()
    try:
        scales = checkpoint_kv_scales(checkpoint) if "head" in (scheme.key.scaling, scheme.value.scaling) else None
        cache = KVCache(spec, scheme, num_blocks, config.block_size, scales)
        runner = make_runner(
            choice,
            checkpoint,
            cache,
            backend=config.backend,
            activations=config.activations,
            num_threads=config.num_threads,
        )
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"{config.model}: the memory is too small for the weights and {num_blocks} KV blocks",
            hint="lower kv_cache_memory or max_model_len, or choose a smaller kv_cache_dtype",
        ) from error
    logger.info("runner: %s (%s)", choice.kind, choice.reason)
    logger.info(
        "KV cache: %d tokens in %s, %.1f MiB; sequences of up to %d tokens",
        cache.capacity_tokens, scheme, cache.num_bytes / 2**20, max_model_len,
    )  # fmt: skip
    return LoadedModel(
        runner=runner,
        runner_choice=choice,
        tokenizer=tokenizer,
        vocab_size=spec.vocab_size,
        num_kv_blocks=num_blocks,
        max_model_len=max_model_len,
        ending_tokens=_ending_tokens(checkpoint, tokenizer),
    )


def _load_on_gpu(
    config: EngineConfig, checkpoint: Checkpoint, gpu: GpuChoice, tokenizer: PreTrainedTokenizerBase | None
) -> LoadedModel:
    from aphroquant.engine.cuda.loading import BATCHED_TOKENS, load_runner

    tokenizer = tokenizer or checkpoint.tokenizer()
    runner, cache, max_model_len = load_runner(config, checkpoint, gpu)
    return LoadedModel(
        runner=runner,
        runner_choice=RunnerChoice("cuda", gpu.reason),
        tokenizer=tokenizer,
        vocab_size=checkpoint.spec.vocab_size,
        num_kv_blocks=cache.num_blocks,
        max_model_len=max_model_len,
        ending_tokens=_ending_tokens(checkpoint, tokenizer),
        batched_tokens=BATCHED_TOKENS,
    )


def _kv_dtype(asked: str, config: Mapping[str, Any]) -> str:
    """`asked`, or for "auto" the dtype that the model was trained in; float16 if its files do not say."""
    if asked != "auto":
        return asked
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return dtype if dtype in ("float32", "bfloat16") else "float16"


def _weight_bytes(choice: RunnerChoice, checkpoint: Checkpoint) -> int:
    """Memory that the weights will take: as stored in the compiled runner, float32 in the reference."""
    return checkpoint.num_bytes if choice.kind == "native" else 4 * _num_parameters(checkpoint.spec)


def _num_parameters(spec: DecoderSpec) -> int:
    linears = (spec.linear_shape(module.split(".", 3)[3]) for module in spec.modules())
    vocabulary = spec.vocab_size * spec.hidden_size
    return sum(rows * columns for rows, columns in linears) + vocabulary * (1 if spec.tie_word_embeddings else 2)


def _ending_tokens(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end tokens of generation_config.json, else of config.json, and the tokenizer's own."""
    stored = _generation_config(checkpoint).get("eos_token_id", checkpoint.config.get("eos_token_id"))
    tokens = stored if isinstance(stored, list) else [stored]
    if not all(token is None or type(token) is int for token in tokens):
        raise InputError(f"{checkpoint.source}: eos_token_id = {stored!r} must be a token id or a list of them")
    return frozenset(token for token in (*tokens, tokenizer.eos_token_id) if isinstance(token, int))


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    from aphroquant.checkpoint.base import read_json

    path = checkpoint.path / "generation_config.json"
    return read_json(path) if path.exists() else {}
