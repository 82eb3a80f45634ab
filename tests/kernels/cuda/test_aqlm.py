"""The AQLM kernels against float64 on the dequantized weight, on a GPU or emulated."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda import tuning
from aphroquant.kernels.cuda.aqlm import plans
from aphroquant.kernels.cuda.aqlm.dequantize import DequantizePlan, dequantize_multiply
from aphroquant.kernels.cuda.aqlm.gather import GatherPlan, gather_multiply
from aphroquant.kernels.cuda.aqlm.linear import CudaAdditiveLinear, unsupported
from aphroquant.kernels.cuda.aqlm.lookup import LookupLinear, LookupPlan
from aphroquant.kernels.cuda.aqlm.packing import CodeLayout, pack_additive, pack_codes, unpack_codes
from aphroquant.kernels.cuda.aqlm.plans import estimate_gather
from aphroquant.kernels.cuda.aqlm.sliced import SlicedLinear, SlicedPlan
from aphroquant.kernels.cuda.aqlm.slices import slice_codes
from aphroquant.kernels.cuda.device import Gpu
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import AdditiveScheme, QuantizedWeight


@pytest.fixture
def gpu_only() -> None:
    from aphroquant.kernels.cuda.device import obstacle

    if reason := obstacle():
        pytest.skip(reason)


# Relative error in the norm: what rounding the outputs does, and no more.
EXACT = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4}


def look_up(weight: QuantizedWeight, x: Tensor, plan: LookupPlan, device: torch.device, bias: Tensor | None) -> Tensor:
    layer = LookupLinear(pack_additive(weight, x.dtype, device), None if bias is None else bias.to(device), x.dtype)
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=device)
    layer(x.to(device), out, plan)
    return out.cpu()


@pytest.mark.parametrize(
    "scheme", [AdditiveScheme(2, 8), AdditiveScheme(1, 16), AdditiveScheme(3, 5), AdditiveScheme(8, 8, in_group=4),
               AdditiveScheme(1, 20), AdditiveScheme(2, 12, in_group=16)], ids=str
)  # fmt: skip
def test_packed_codes_are_the_codes(scheme: AdditiveScheme) -> None:
    codes = torch.randint(0, 2**scheme.code_bits, (37, 91, scheme.num_codebooks), dtype=torch.int32)
    layout = CodeLayout.of(scheme)
    found = unpack_codes(pack_codes(codes, layout), layout, (37, 91)).int() & (2 ** (8 * layout.code_bytes) - 1)
    assert torch.equal(found, codes)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (AdditiveScheme(2, 8), torch.bfloat16),
        (AdditiveScheme(2, 8), torch.float16),
        (AdditiveScheme(1, 8), torch.bfloat16),
        (AdditiveScheme(2, 5), torch.bfloat16),
    ],
    ids=str,
)
def test_tables_give_the_product(scheme: AdditiveScheme, dtype: torch.dtype, device: torch.device) -> None:
    weight = random_weight(scheme, 83, 1032)
    x, bias = torch.randn(1, 1032).to(dtype), torch.randn(83)
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    found = look_up(weight, x, LookupPlan(2, 4, 4), device, bias)
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < EXACT[dtype], f"{error:.2e}"


ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # with codebooks rounded to the inputs' type


def gather(weight: QuantizedWeight, x: Tensor, plan: GatherPlan, device: torch.device, bias: Tensor | None) -> Tensor:
    packed = pack_additive(weight, x.dtype, device)
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=device)
    tiles = -(-x.shape[0] // 8)
    gather_multiply(packed, x.to(device), None if bias is None else bias.to(device), out, tiles, plan, 2)
    return out.cpu()


GATHERED = {
    "2x8 copies": (AdditiveScheme(2, 8), GatherPlan(4, 1, 8)),
    "1x16 from L2": (AdditiveScheme(1, 16), GatherPlan(4, 1, 0)),
    "1x10 partly shared": (AdditiveScheme(1, 10), GatherPlan(4, 1, 0, 300)),
    "3x5 g4": (AdditiveScheme(3, 5, in_group=4), GatherPlan(2, 1, 2)),
    "8x8 g16": (AdditiveScheme(8, 8, in_group=16), GatherPlan(2, 1, 1)),
    "2x12": (AdditiveScheme(2, 12), GatherPlan(2, 1, 0)),
    "5x4 g4": (AdditiveScheme(5, 4, in_group=4), GatherPlan(2, 1, 0)),
    "1x17": (AdditiveScheme(1, 17), GatherPlan(2, 1, 0)),
}


GATHERED_IN = [
    *((case, torch.bfloat16) for case in GATHERED),
    *((case, torch.float16) for case in ("2x8 copies", "1x10 partly shared", "3x5 g4")),
]


@pytest.mark.parametrize(("case", "dtype"), GATHERED_IN)
def test_gathered_entries_give_the_product(case: str, dtype: torch.dtype, device: torch.device) -> None:
    scheme, plan = GATHERED[case]
    weight = random_weight(scheme, 83, 272)
    x, bias = torch.randn(11, 272).to(dtype), torch.randn(83)
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    found = gather(weight, x, plan, device, bias)
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < ROUNDED[dtype], f"{error:.2e}"


@pytest.mark.parametrize(("case", "dtype"), GATHERED_IN)
def test_dequantized_rows_give_the_product(case: str, dtype: torch.dtype, device: torch.device) -> None:
    weight = random_weight(GATHERED[case][0], 83, 272)
    x, bias = torch.randn(19, 272).to(dtype), torch.randn(83).to(dtype)
    out = torch.full((19, 83), torch.nan, dtype=dtype, device=device)
    packed = pack_additive(weight, dtype, device)
    dequantize_multiply(packed, x.to(device), bias.to(device), out, DequantizePlan(0), 2)
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    error = float((out.cpu().double() - expected).norm() / expected.norm())
    assert error < ROUNDED[dtype], f"{error:.2e}"


SLICED = {
    "1x14": (AdditiveScheme(1, 14), 530, 272),
    "2x13": (AdditiveScheme(2, 13), 70, 136),
    "1x12, two chunks": (AdditiveScheme(1, 12), 20, 8 * 700),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SLICED)
def test_sliced_codebooks_give_the_product(case: str, dtype: torch.dtype, device: torch.device) -> None:
    scheme, n, k = SLICED[case]
    weight = random_weight(scheme, n, k)
    x, bias = torch.randn(1, k).to(dtype), torch.randn(n)
    packed = pack_additive(weight, dtype, device)
    layer = SlicedLinear(packed, weight["codes"].to(device), bias.to(device))
    out = torch.full((1, n), torch.nan, dtype=dtype, device=device)
    layer(x.to(device), out, SlicedPlan(2, 4))
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    error = float((out.cpu().double() - expected).norm() / expected.norm())
    assert error < ROUNDED[dtype], f"{error:.2e}"


def test_a_token_that_is_no_number_stays_alone(device: torch.device) -> None:
    weight, plan = random_weight(AdditiveScheme(2, 8), 40, 136), GatherPlan(2, 1, 1)
    x = torch.randn(5, 136).bfloat16()
    clean = gather(weight, x, plan, device, None)
    x[1, 3], x[3, 130] = torch.nan, torch.inf
    found = gather(weight, x, plan, device, None)
    assert not found[[1, 3]].isfinite().any()
    assert torch.equal(found[[0, 2, 4]], clean[[0, 2, 4]])


def test_no_output_hides_an_input_that_is_no_number(device: torch.device) -> None:
    x = torch.randn(1, 136).bfloat16()
    x[0, 77] = torch.nan
    assert (
        not look_up(random_weight(AdditiveScheme(2, 8), 40, 136), x, LookupPlan(1, 2, 4), device, None).isfinite().any()
    )


@pytest.mark.parametrize("scheme", [AdditiveScheme(1, 14), AdditiveScheme(2, 16)], ids=str)
def test_slices_hold_every_code_once_with_its_inputs(scheme: AdditiveScheme) -> None:
    rows, groups = 261, 520
    codes = torch.randint(0, 2**scheme.code_bits, (rows, groups, scheme.num_codebooks))
    entries = codes + torch.arange(scheme.num_codebooks) * 2**scheme.code_bits
    sliced = slice_codes(entries, scheme.num_codebooks * 2**scheme.code_bits)
    low = sliced.quads[:, :256].contiguous().view(torch.int16).view(-1, 32, 4).int() & 0xFFFF
    words = (low | sliced.quads[:, 256:].view(-1, 32, 4).int() << 16).permute(0, 2, 1).flatten(0, 1)  # [step, lane]
    found = []
    for unit, offsets in enumerate(sliced.offsets.tolist()):
        for group, numbers in enumerate(sliced.row_numbers[unit].tolist()):
            for lane, word in itertools.product(range(32), range(offsets[group], offsets[group + 1])):
                value = int(words[word, lane])
                own, local = value & 0x1FFF, value >> 13
                if local < sliced.chunk_groups:
                    entry = unit // sliced.chunks * 8192 + own
                    found.append((numbers[lane % 8], unit % sliced.chunks * sliced.chunk_groups + local, entry))
    flat = entries.flatten(1)
    expected = [
        (row, place // scheme.num_codebooks, int(flat[row, place]))
        for row, place in itertools.product(range(rows), range(flat.shape[1]))
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 64, 65, 300, 4096])
def test_any_number_of_tokens_has_a_way(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice between the kernels, by the checked-in tables, as on the GPU that they were measured on."""
    h100 = Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 132, 50 << 20)
    for name in ("aphroquant.kernels.cuda.tuning.gpu", "aphroquant.kernels.cuda.aqlm.plans.gpu"):
        monkeypatch.setattr(name, lambda device: h100)
    for scheme in (AdditiveScheme(2, 8), AdditiveScheme(1, 16), AdditiveScheme(2, 12)):
        layer = plans.Layer(scheme, 4096, 4096, 0)
        one_by_one = [plans.runs_one_by_one(layer, tokens, table) for table in (plans.LOOKUP, plans.SLICED)]
        if tokens >= 8:
            assert one_by_one == [False, False]
            assert tokens <= plans.MAX_GATHERED or not plans.gathers(layer, tokens)
        if tokens <= plans.MAX_GATHERED:
            assert plans.gather_plan(layer, tokens).warps
    for cached in (plans.runs_one_by_one, plans.gathers, plans.gather_plan, tuning._tuned):
        cached.cache_clear()


def test_estimates_fit_into_shared_memory() -> None:
    for scheme, tiles, limit in itertools.product(
        (AdditiveScheme(2, 8), AdditiveScheme(1, 16), AdditiveScheme(8, 8), AdditiveScheme(1, 4, in_group=4)),
        (1, 2, 4, 8),
        (99 << 10, 163 << 10, 227 << 10),
    ):
        plan = estimate_gather(scheme, tiles, limit)
        assert plan.shared_bytes(scheme) <= limit
    assert estimate_gather(AdditiveScheme(2, 8), 1, 227 << 10).copies == 8
    assert estimate_gather(AdditiveScheme(1, 16), 1, 227 << 10).copies == 0


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (AdditiveScheme(2, 8), None),
        (AdditiveScheme(7, 3, in_group=4), None),
        (AdditiveScheme(2, 8, out_group=2), "groups of one output"),
        (AdditiveScheme(2, 8, in_group=6), "groups of 4, 8"),
        (AdditiveScheme(1, 30), "up to 24 bits"),
        (AdditiveScheme(200, 8), "fewer than 200"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_run_is_told(scheme: AdditiveScheme, reason: str | None) -> None:
    found = unsupported(scheme)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 33, 64, 65, 300])
@pytest.mark.parametrize(
    "scheme",
    [AdditiveScheme(2, 8), AdditiveScheme(1, 16), AdditiveScheme(1, 8), AdditiveScheme(4, 8), AdditiveScheme(2, 12),
     AdditiveScheme(3, 6, in_group=4), AdditiveScheme(1, 16, in_group=16), AdditiveScheme(2, 16)], ids=str
)  # fmt: skip
def test_the_linear_layer_gives_the_product(gpu_only: None, scheme: AdditiveScheme, tokens: int) -> None:
    weight, bias = random_weight(scheme, 333, 1040, "cuda"), torch.randn(333)
    x = torch.randn(tokens, 1040, device="cuda").bfloat16()
    layer = CudaAdditiveLinear(weight, bias, torch.bfloat16)
    found, again = layer(x), layer(x)
    assert torch.equal(found, again)
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.cuda().double()
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < ROUNDED[torch.bfloat16], f"{error:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [AdditiveScheme(2, 8), AdditiveScheme(1, 16)], ids=str)
def test_rows_that_are_no_numbers_stay_alone_on_the_gpu(gpu_only: None, scheme: AdditiveScheme) -> None:
    weight = random_weight(scheme, 96, 512, "cuda")
    layer, x = CudaAdditiveLinear(weight, None, torch.bfloat16), torch.randn(5, 512, device="cuda").bfloat16()
    clean = layer(x)
    x[1, 3], x[3, 200] = torch.nan, torch.inf
    found = layer(x)
    assert not found[[1, 3]].isfinite().any()
    assert torch.equal(found[[0, 2, 4]], clean[[0, 2, 4]])
    assert not layer(x[1:2]).isfinite().any()


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [AdditiveScheme(2, 8), AdditiveScheme(1, 16)], ids=str)
def test_the_linear_layer_runs_in_a_graph(gpu_only: None, scheme: AdditiveScheme) -> None:
    layer = CudaAdditiveLinear(random_weight(scheme, 200, 512, "cuda"), None, torch.bfloat16)
    x, out = torch.randn(1, 512, device="cuda").bfloat16(), []
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.append(layer(x))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out[0], layer(x))
