"""Fused kernels on the GPU against float64, in milliseconds."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from aphroquant.engine.kv_cache import KV_FORMATS, LayerCache
from aphroquant.kernels.cuda.attention.shape import AttentionShape
from aphroquant.kernels.cuda.fused.elements import OutputFormat, Quantized
from aphroquant.kernels.cuda.fused.embedding import FusedEmbedding
from aphroquant.kernels.cuda.fused.gated_activation import FusedGatedActivation
from aphroquant.kernels.cuda.fused.rms_norm import FusedRmsNorm
from aphroquant.kernels.cuda.fused.rotary_cache import FusedRotaryCache
from aphroquant.kernels.cuda.self_test import SelfTest
from aphroquant.models.rope import cos_sin, rotate
from aphroquant.models.spec import RopeSpec

_TOLERANCE = {OutputFormat.ELEMENT: 4e-3, OutputFormat.FLOAT8: 4e-2, OutputFormat.INT8: 2e-2}


def _relative(out: Tensor | Quantized, expected: Tensor) -> float:
    values = out.double() if isinstance(out, Tensor) else out.codes.double() * out.scales.double()[:, None]
    return float((values - expected).norm() / expected.norm())


def _norm_error(output: OutputFormat) -> float:
    residual, delta = torch.randn(3, 576, device="cuda"), torch.randn(3, 576, device="cuda", dtype=torch.bfloat16)
    gain = torch.randn(576, device="cuda")
    total = residual.double() + delta.double()
    expected = gain.double() * total * (total.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    return _relative(FusedRmsNorm(576, 1e-5, torch.bfloat16, output)(residual, delta, gain), expected)


def _activation_error(output: OutputFormat) -> float:
    gate_up = torch.randn(3, 2 * 1536, device="cuda", dtype=torch.bfloat16)
    gate, up = gate_up.double().chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    return _relative(FusedGatedActivation(1536, torch.bfloat16, output=output)(gate_up), expected)


def _embedding_error() -> float:
    table = torch.randn(50, 576, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([3, 49, 0], dtype=torch.int32, device="cuda")
    return _relative(FusedEmbedding(table)(ids), table[ids.long()].double())


def _rotary_error() -> float:
    shape = AttentionShape(4, 2, 64, 16, KV_FORMATS["bfloat16"], KV_FORMATS["bfloat16"])
    qkv = torch.randn(3, 8 * 64, device="cuda", dtype=torch.bfloat16)
    positions = torch.tensor([0, 9, 31], dtype=torch.int32, device="cuda")
    tables = tuple(table.contiguous().cuda() for table in cos_sin(RopeSpec(1e4), 64, torch.arange(32)))
    memory = [torch.zeros(2, 2, 16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    cache = LayerCache(memory[0], memory[1], None, None)
    slots = torch.tensor([5, 20, 30], device="cuda")
    queries = FusedRotaryCache(shape, torch.bfloat16)(qkv, positions, slots, (tables[0], tables[1]), cache)
    heads = qkv.double().view(3, 8, 64)
    cos, sin = (table.double()[positions.long()] for table in tables)
    keys, values = (side[:, slots].transpose(0, 1) for side in cache.read(torch.arange(2, device="cuda")))
    return max(
        _relative(queries, rotate(heads[:, :4], cos, sin)),
        _relative(keys, rotate(heads[:, 4:6], cos, sin)),
        _relative(values, heads[:, 6:]),
    )


SELF_TESTS = (
    *(
        SelfTest(f"fused: {name}, {output.name.lower()} out", partial(error, output), _TOLERANCE[output])
        for name, error in (("norm", _norm_error), ("gated activation", _activation_error))
        for output in OutputFormat
    ),
    SelfTest("fused: embedding", _embedding_error, 1e-6),
    SelfTest("fused: rotary positions and cache write", _rotary_error, 4e-3),
)
