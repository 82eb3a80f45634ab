"""Every kind of compiled CPU kernel against float64, with each instruction set that runs here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.kv_cache import KVCache, KVScheme
from aphroquant.kernels.cpu.attention import CacheKernels
from aphroquant.kernels.cpu.library import instruction_sets, select_instruction_set
from aphroquant.kernels.cpu.linear import CpuLinear
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.reference.attention import paged_attention
from aphroquant.kernels.self_test import SelfTest, relative_error
from aphroquant.models.spec import DecoderSpec, RopeSpec
from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, KQuantScheme, LookupScheme, Scheme

_FLOAT = 2e-6  # float32 sums
_INT8 = 1.5e-2  # inputs rounded to 8 bit in groups of 32 columns
_SCHEMES: tuple[Scheme, ...] = (
    DenseScheme(torch.bfloat16),
    IntegerScheme(4, 128, symmetric=True),
    IntegerScheme(4, 32, symmetric=False),
    IntegerScheme(8, None, symmetric=True),
    IntegerScheme(3, 128, symmetric=False, act_order=True),
    FloatScheme("channel"),
    FloatScheme("block", (128, 128)),
    LookupScheme("nf4", 64, "float"),
    KQuantScheme("q4_k"),
    KQuantScheme("q6_k"),
)


def cpu_self_tests() -> list[SelfTest]:
    """Linear layers of every kind of weight, and attention over the paged cache."""
    tests = []
    for name in instruction_sets():
        for scheme in _SCHEMES:
            run = partial(_linear, scheme, "float")
            tests.append(SelfTest(f"cpu {name}: linear {scheme}", _with(name, run), _FLOAT))
        rounded = partial(_linear, IntegerScheme(4, 128, symmetric=True), "int8")
        tests.append(SelfTest(f"cpu {name}: linear int4 sym g128, inputs in 8 bit", _with(name, rounded), _INT8))
        tests.append(SelfTest(f"cpu {name}: paged attention", _with(name, _attention), _FLOAT))
    return tests


def _with(instruction_set: str, run: Callable[[], float]) -> Callable[[], float]:
    def selected() -> float:
        select_instruction_set(instruction_set)
        return run()

    return selected


def _linear(scheme: Scheme, activations: str) -> float:
    """One row, as in decoding, and many."""
    weight = random_weight(scheme, 80, 512)
    layer = CpuLinear(weight, None, activations=activations)
    matrix, x = weight.dequantize(torch.float64), torch.randn(21, 512)
    return max(relative_error(layer(rows), rows.double() @ matrix.T) for rows in (x[:1], x))


def _attention() -> float:
    """Two sequences with a grouped-query cache, one of them in the middle of its prompt."""
    heads, kv_heads, head_dim, block_size = 6, 2, 32, 16
    context_lens, query_lens = [40, 23], [1, 9]
    spec = DecoderSpec(
        "llama", 10, 64, 64, 1, heads, kv_heads, head_dim, 1e-5, 64, RopeSpec(1e4), True, False, False, False, False,
        (None,),
    )  # fmt: skip
    cache = KVCache(spec, KVScheme.named("float32"), 8, block_size)
    tables = torch.randperm(8)[:6].view(2, 3)
    whole = _batch(context_lens, context_lens, tables, block_size)
    k, v = (torch.randn(sum(context_lens), kv_heads, head_dim) for _ in range(2))
    kernels = CacheKernels(cache)
    kernels.store(whole, k, v)
    batch = _batch(query_lens, context_lens, tables, block_size)
    q = torch.randn(sum(query_lens), heads, head_dim)
    expected = paged_attention(q, batch, cache.layer(0), scale=head_dim**-0.5, sliding_window=None)
    return relative_error(kernels.attend(batch, q), expected)


def _batch(query_lens: list[int], context_lens: list[int], tables: Tensor, block_size: int) -> ForwardBatch:
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    positions = torch.cat([torch.arange(c - q, c) for q, c in zip(query_lens, context_lens, strict=True)])
    owners = torch.repeat_interleave(torch.arange(len(query_lens)), torch.tensor(query_lens))
    return ForwardBatch(
        token_ids=torch.zeros_like(positions, dtype=torch.int32),
        positions=positions.int(),
        slot_mapping=tables[owners, positions // block_size] * block_size + positions % block_size,
        query_start=starts.int(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables.int(),
        logits_rows=(starts[1:] - 1).int(),
    )
