"""Fused kernels against float64, on a GPU or emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.engine.kv_cache import KV_FORMATS, KVCache, KVScales, KVScheme, LayerCache
from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.attention.shape import AttentionShape
from aphroquant.kernels.cuda.fused.elements import OutputFormat, Quantized, element_macro, vector_width
from aphroquant.kernels.cuda.fused.embedding import FusedEmbedding
from aphroquant.kernels.cuda.fused.gated_activation import FusedGatedActivation
from aphroquant.kernels.cuda.fused.rms_norm import FusedRmsNorm
from aphroquant.kernels.cuda.fused.rotary_cache import FusedRotaryCache, HeadNorms
from aphroquant.models.rope import cos_sin, rotate
from aphroquant.models.spec import RopeSpec

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
TOP = {OutputFormat.FLOAT8: 448.0, OutputFormat.INT8: 127.0}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(out: Tensor, expected: Tensor) -> float:
    return float((out.cpu().double() - expected).norm() / expected.norm())


def check_output(result: Tensor | Quantized, expected: Tensor, output: OutputFormat, dtype: torch.dtype) -> None:
    """Elements are near; codes are those of the exact numbers, but for ties that rounding in float32 decides."""
    if isinstance(result, Tensor):
        assert output is OutputFormat.ELEMENT
        assert error_of(result, expected) < TOLERANCE[dtype]
        return
    scales = expected.abs().amax(1) / TOP[output]
    assert torch.allclose(result.scales.cpu().double(), scales, rtol=1e-5)
    steps = expected / scales[:, None]
    codes = steps.round() if output is OutputFormat.INT8 else steps.clamp(-448, 448).to(torch.float8_e4m3fn).double()
    assert (result.codes.cpu().double() != codes).double().mean() < 2e-3


NORMS = [(3, 576, torch.float16), (2, 4096, torch.bfloat16), (1, 90, torch.bfloat16)]
ACTIVATIONS = [(3, 1536, torch.float16), (2, 4104, torch.bfloat16), (1, 45, torch.bfloat16)]


def each_output(cases: list[tuple[int, int, torch.dtype]]) -> list[tuple[int, int, torch.dtype, OutputFormat]]:
    """Every case with elements, and the first with every format."""
    formats = [(*cases[0], output) for output in OutputFormat]
    return formats + [(*case, OutputFormat.ELEMENT) for case in cases[1:]]


@pytest.mark.parametrize(("rows", "size", "dtype", "output"), each_output(NORMS))
def test_the_norm_of_the_residual_sum_agrees_with_float64(
    device: torch.device, rows: int, size: int, dtype: torch.dtype, output: OutputFormat
) -> None:
    residual, delta, gain = random(rows, size), random(rows, size, seed=1).to(dtype), random(size, seed=2)
    total = residual.double() + delta.double()
    expected = gain.double() * total / (total.square().mean(1, keepdim=True) + 1e-5).sqrt()
    own = residual.clone().to(device)
    result = FusedRmsNorm(size, 1e-5, dtype, output)(own, delta.to(device), gain.to(device))
    check_output(result, expected, output, dtype)
    assert torch.equal(own.cpu(), residual + delta.float())


def test_the_norm_of_chosen_rows_leaves_the_residual_alone(device: torch.device) -> None:
    residual, delta, gain = random(5, 64), random(5, 64, seed=1).half(), random(64, seed=2)
    own = residual.clone().to(device)
    rows = torch.tensor([4, 1], dtype=torch.int32, device=device)
    result = FusedRmsNorm(64, 1e-6, torch.float16)(own, delta.to(device), gain.to(device), rows=rows)
    total = (residual.double() + delta.double())[[4, 1]]
    assert isinstance(result, Tensor)
    assert error_of(result, gain.double() * total / (total.square().mean(1, keepdim=True) + 1e-6).sqrt()) < 1e-3
    assert torch.equal(own.cpu(), residual)


@pytest.mark.parametrize("output", [OutputFormat.FLOAT8, OutputFormat.INT8])
def test_a_row_of_zeros_has_scale_one_and_nan_stays_in_its_row(device: torch.device, output: OutputFormat) -> None:
    gate_up = random(3, 128).half()
    gate_up[1] = 0
    gate_up[2, 7] = torch.nan
    result = FusedGatedActivation(64, torch.float16, output=output)(gate_up.to(device))
    assert isinstance(result, Quantized)
    assert torch.isfinite(result.scales[0])
    assert result.scales[1] == 1
    assert not result.codes[1].float().any()
    assert torch.isnan(result.scales[2])


@pytest.mark.parametrize(("rows", "size", "dtype", "output"), each_output(ACTIVATIONS))
def test_the_gated_activation_agrees_with_float64(
    device: torch.device, rows: int, size: int, dtype: torch.dtype, output: OutputFormat
) -> None:
    gate_up = (2 * random(rows, 2 * size)).to(dtype)
    gate, up = gate_up.double().chunk(2, 1)
    result = FusedGatedActivation(size, dtype, output=output)(gate_up.to(device))
    check_output(result, torch.nn.functional.silu(gate) * up, output, dtype)


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu_agrees_with_float64(device: torch.device, activation: str, approximate: str) -> None:
    gate_up = (2 * random(2, 128)).half()
    gate, up = gate_up.double().chunk(2, 1)
    result = FusedGatedActivation(64, torch.float16, activation)(gate_up.to(device))
    check_output(
        result, torch.nn.functional.gelu(gate, approximate=approximate) * up, OutputFormat.ELEMENT, torch.float16
    )


@pytest.mark.parametrize("size", [576, 4096, 30])
def test_the_embedding_gives_rows_of_the_table_exactly(device: torch.device, size: int) -> None:
    table = random(11, size).bfloat16()
    ids = torch.tensor([10, 0, 3, 3], dtype=torch.int32)
    assert torch.equal(FusedEmbedding(table.to(device))(ids.to(device)).cpu(), table[ids.long()].float())


def paged_cache(shape: AttentionShape, num_blocks: int, device: torch.device) -> LayerCache:
    vectors = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
    sides = [torch.zeros(vectors, dtype=kv_format.dtype, device=device) for kv_format in (shape.key, shape.value)]
    scales = [
        {
            "none": None,
            "head": (torch.arange(shape.num_kv_heads) * 0.25 + 0.05).to(device),
            "token_head": torch.zeros(vectors[:3], device=device),
        }[kv_format.scaling]
        for kv_format in (shape.key, shape.value)
    ]
    return LayerCache(*sides, *scales)


@pytest.mark.parametrize(
    ("kv_format", "heads", "kv_heads", "head_dim", "rotary_dim", "has_norm"),
    [
        ("bfloat16", 4, 2, 128, 128, False),
        ("float16", 3, 1, 64, 64, True),
        ("fp8_e4m3", 2, 2, 96, 32, True),
        ("int8_per_token_head", 2, 1, 64, 64, False),
        ("bfloat16", 2, 1, 20, 20, False),
    ],
)
def test_rotary_positions_and_the_cache_write_agree_with_float64(
    device: torch.device, kv_format: str, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, has_norm: bool
) -> None:
    dtype = torch.float16
    shape = AttentionShape(heads, kv_heads, head_dim, 16, KV_FORMATS[kv_format], KV_FORMATS[kv_format])
    qkv = random(5, (heads + 2 * kv_heads) * head_dim).to(dtype)
    positions = torch.tensor([0, 17, 3, 4, 90], dtype=torch.int32)
    slots = torch.tensor([33, 2, -1, 63, 16])
    tables = tuple(table.contiguous() for table in cos_sin(RopeSpec(1e4), rotary_dim, torch.arange(100)))
    gains = (random(head_dim, seed=4), random(head_dim, seed=5))
    cache = paged_cache(shape, 4, device)
    kernel = FusedRotaryCache(shape, dtype, has_norm=has_norm, rotary_dim=rotary_dim)
    norms = HeadNorms(gains[0].to(device), gains[1].to(device), 1e-6) if has_norm else None
    queries = kernel(
        qkv.to(device), positions.to(device), slots.to(device), tuple(t.to(device) for t in tables), cache, norms=norms
    )

    q, k, v = qkv.double().view(5, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    if has_norm:
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
            for x, gain in zip((q, k), gains, strict=True)
        )
    cos, sin = (table.double()[positions.long()] for table in tables)
    q, k = (torch.cat((rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), -1) for x in (q, k))
    assert error_of(queries, q) < TOLERANCE[dtype]

    stored = LayerCache(*(None if part is None else part.cpu() for part in cache))
    keys, values = stored.read(torch.arange(4))  # [kv heads, 64, d]
    written = slots >= 0
    tolerance = {"bfloat16": 3e-3, "float16": 4e-4, "fp8_e4m3": 4e-2, "int8_per_token_head": 1e-2}[kv_format]
    for side, exact in ((keys, k), (values, v)):
        assert error_of(side[:, slots[written]].transpose(0, 1), exact[written]) < tolerance
    untouched = torch.ones(64, dtype=torch.bool)
    untouched[slots[written]] = False
    assert not keys[:, untouched].any()
    assert not values[:, untouched].any()


def test_the_cache_holds_the_same_codes_as_the_reference_writes(device: torch.device) -> None:
    from types import SimpleNamespace

    spec = SimpleNamespace(num_layers=1, num_kv_heads=2, head_dim=64)
    for name in ("fp8_e4m3", "int8_per_token_head"):
        scales = [KVScales(torch.tensor([0.5, 0.003]), torch.tensor([1.0, 0.01]))]
        expected = KVCache(spec, KVScheme.named(name), 2, 16, scales)
        ours = KVCache(spec, KVScheme.named(name), 2, 16, scales)
        qkv = random(3, 6 * 64).bfloat16()
        slots = torch.tensor([1, 30, 7])
        heads = qkv.float().view(3, 6, 64)
        expected.store(0, slots, heads[:, 2:4], heads[:, 4:])
        shape = AttentionShape(2, 2, 64, 16, KV_FORMATS[name], KV_FORMATS[name])
        cache = LayerCache(*(None if part is None else part.to(device) for part in ours.layer(0)))
        ones, zeros = torch.ones(1, 32, device=device), torch.zeros(1, 32, device=device)
        FusedRotaryCache(shape, torch.bfloat16)(
            qkv.to(device), torch.zeros(3, dtype=torch.int32, device=device), slots.to(device), (ones, zeros), cache
        )
        for own, other in zip(cache, expected.layer(0), strict=True):
            if own is not None and other is not None:
                assert torch.equal(own.cpu().contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def test_only_16_bit_dtypes_are_computed_in() -> None:
    with pytest.raises(UsageError, match=r"bfloat16 or torch\.float16"):
        element_macro(torch.float32)


def test_vectors_divide_the_row() -> None:
    assert [vector_width(size) for size in (4096, 12, 30, 45)] == [8, 4, 2, 1]
