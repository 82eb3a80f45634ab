"""The decoder's forward out of fused kernels, emulated, beside the reference runner."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Layers
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aphroquant.checkpoint import open_checkpoint
from aphroquant.engine.batch import pack
from aphroquant.engine.cuda.decoder import CudaDecoder
from aphroquant.engine.cuda.runner import CudaRunner
from aphroquant.engine.cuda.weights import load_weights
from aphroquant.engine.kv_cache import KVCache, KVScheme
from aphroquant.engine.runner import ReferenceRunner
from aphroquant.engine.sequence import Sequence
from aphroquant.kernels.dispatch import select_backend
from aphroquant.kernels.reference.grouped import LoopedGroupedLinear
from aphroquant.kernels.reference.linear import ReferenceLinear
from aphroquant.schemes import QuantizedWeight

TinyCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
BLOCK_SIZE = 16
QWEN3_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]}


def sequence(tokens: list[int], blocks: list[int]) -> Sequence:
    made = Sequence(tokens)
    made.add_blocks(blocks)
    return made


def looped(weights: Layers[QuantizedWeight]) -> LoopedGroupedLinear:
    return LoopedGroupedLinear([ReferenceLinear(weight, None) for weight in weights], *weights[0].shape)


def emulated_runner(path: Path, kv_cache_dtype: str, dtype: torch.dtype, max_num_seqs: int) -> CudaRunner:
    checkpoint = open_checkpoint(str(path))
    weights = load_weights(checkpoint, ReferenceLinear, CPU, dtype, looped)
    scheme = KVScheme.named(kv_cache_dtype)
    decoder = CudaDecoder(checkpoint.spec, weights, scheme, block_size=BLOCK_SIZE, max_positions=128, dtype=dtype)
    cache = KVCache(checkpoint.spec, scheme, 16, BLOCK_SIZE)
    return CudaRunner(decoder, cache, max_num_seqs=max_num_seqs, max_model_len=128)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 12}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", QWEN3_EXPERTS),
        ("qwen3_moe", QWEN3_EXPERTS | {"num_experts_per_tok": 6, "mlp_only_layers": []}),
        ("qwen3_moe", QWEN3_EXPERTS | {"num_experts_per_tok": 6, "mlp_only_layers": [0], "norm_topk_prob": True}),
    ],
)
def test_emulated_forwards_agree_with_the_reference_runner(
    emulated_kernels: None, tiny_checkpoint: TinyCheckpoint, family: str, overrides: dict[str, Any]
) -> None:
    path = tiny_checkpoint(family, **({"head_dim": 16} | overrides))
    ours = emulated_runner(path, "float16", torch.float16, max_num_seqs=4)
    checkpoint = open_checkpoint(str(path))
    cache = KVCache(checkpoint.spec, KVScheme.named("float32"), 16, BLOCK_SIZE)
    reference = ReferenceRunner(checkpoint, cache, select_backend("reference"))
    generator = np.random.default_rng(0)
    tokens = [generator.integers(3, 250, size).tolist() for size in (40, 23, 5)]
    sequences = [sequence(own, blocks) for own, blocks in zip(tokens, ([3, 9, 1], [4, 0], [7]), strict=True)]
    for counts in ([30, 0, 0], [1, 20, 0], [1, 1, 5], [1, 1, 0]):  # a prompt; mixed; mixed; decodes alone
        step = [(own, count) for own, count in zip(sequences, counts, strict=True) if count]
        batch = pack(step, BLOCK_SIZE)
        batch.logits_rows = torch.arange(batch.num_tokens, dtype=torch.int32)
        expected, logits = reference.forward(batch), ours.forward(batch)
        assert logits.dtype == torch.float32
        error = float((logits - expected).norm() / expected.norm())
        assert error < 5e-3, f"{counts}: {error:.1e}"
        for own, count in step:
            own.num_computed += count


class CodesLinear(ReferenceLinear):
    """Takes its input as FP8 codes."""

    takes_codes = True

    def multiply_codes(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        assert codes.dtype == torch.float8_e4m3fn
        return self(codes.float() * scales[:, None]).to(dtype)


def test_layers_that_take_codes_get_normed_and_activated_inputs_as_codes(
    emulated_kernels: None, tiny_checkpoint: TinyCheckpoint
) -> None:
    path = tiny_checkpoint("llama", head_dim=16)
    exact = emulated_runner(path, "float16", torch.float16, max_num_seqs=1)
    checkpoint, scheme = open_checkpoint(str(path)), KVScheme.named("float16")
    weights = load_weights(checkpoint, CodesLinear, CPU, torch.float16)
    decoder = CudaDecoder(
        checkpoint.spec, weights, scheme, block_size=BLOCK_SIZE, max_positions=128, dtype=torch.float16
    )
    cache = KVCache(checkpoint.spec, scheme, 16, BLOCK_SIZE)
    rounded = CudaRunner(decoder, cache, max_num_seqs=1, max_model_len=128)
    batch = pack([(sequence(list(range(3, 23)), [5, 2]), 20)], BLOCK_SIZE)
    expected, logits = exact.forward(batch), rounded.forward(batch)
    error = float((logits - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.1  # inputs with three bits after the point
