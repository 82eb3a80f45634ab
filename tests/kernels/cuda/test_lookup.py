"""Lookup weights and super-blocks in the kernels of integer weights against float64, on a GPU or emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.device import obstacle
from aphroquant.kernels.cuda.integer.decode import DecodeLinear
from aphroquant.kernels.cuda.integer.decode_plan import DecodePlan
from aphroquant.kernels.cuda.integer.mma import MmaTile, mma_multiply
from aphroquant.kernels.cuda.integer.packing import PackedInteger, pack_codes
from aphroquant.kernels.cuda.integer.problem import scale_exponent
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile, wgmma_multiply
from aphroquant.kernels.cuda.lookup.linear import CudaLookupLinear
from aphroquant.kernels.cuda.lookup.packing import pack_lookup, unpack_lookup_codes
from aphroquant.kernels.cuda.lookup.super_blocks import pack_super_blocks
from aphroquant.kernels.cuda.lookup.tables import rounded_table, table_factor
from aphroquant.schemes import ActivationScheme, KQuantScheme, LookupScheme, QuantizedWeight, Scheme
from aphroquant.schemes.lookup import TABLES, TableName

# Relative error in the norm: what rounding outputs does, and less than rounding the weight to the type of the inputs.
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4}
# Products for batches round the weight: they may be as wrong as products with the weight dequantized in that type, plus
# what chance does to few outputs, and plus what rounding a table did (tables.py).
BATCH_FACTOR = 1.25

SCHEMES: dict[str, Scheme] = {
    "nf4": LookupScheme("nf4", 64, "float"),
    "nf4 nested": LookupScheme("nf4", 64, "nested", flattened=True),
    "fp4 flat": LookupScheme("fp4", 128, "float", flattened=True),
    "mxfp4": LookupScheme("e2m1", 32, "e8m0"),
    "nvfp4": LookupScheme("e2m1", 16, "e4m3"),
    "iq4_nl": LookupScheme("iq4_nl", 32, "float"),
    "q2_k": KQuantScheme("q2_k"),
    "q3_k": KQuantScheme("q3_k"),
    "q4_k": KQuantScheme("q4_k"),
    "q5_k": KQuantScheme("q5_k"),
    "q6_k": KQuantScheme("q6_k"),
}
# fp16 cannot hold every scale: those kinds come in both types.
CASES = [
    *((name, torch.bfloat16) for name in SCHEMES),
    *((name, torch.float16) for name in ("nf4 nested", "mxfp4", "nvfp4", "q5_k")),
]
SAME_KERNELS = ("nf4", "fp4 flat", "iq4_nl", "q3_k")  # as others of the list, in the kernels for batches


def any_weight(scheme: Scheme, rows: int, columns: int) -> QuantizedWeight:
    """With every code, and scales of every size that the scheme's files have."""
    tensors: dict[str, Tensor] = {}
    for name, shape in scheme.shapes(rows, columns).items():
        dtype = scheme.dtypes().get(name, torch.float32)
        bits = scheme.storage_bits(name) or 8
        if name in ("global_scale", "nested_offset"):
            tensors[name] = torch.tensor(0.0123, dtype=torch.float64 if name == "global_scale" else torch.float32)
        elif dtype == torch.float8_e8m0fnu:
            tensors[name] = torch.randint(110, 130, shape, dtype=torch.uint8).view(dtype)
        elif dtype.is_floating_point:
            values = torch.randn(shape).abs() if dtype == torch.float8_e4m3fn else torch.rand(shape) * 0.02 + 0.001
            tensors[name] = values.to(torch.float16 if name in ("d", "dmin") else dtype)
        elif dtype == torch.int8:
            tensors[name] = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=dtype)
        else:
            tensors[name] = torch.randint(0, 2**bits, shape, dtype=dtype)
    return QuantizedWeight(scheme, tensors, (rows, columns))


def packed_weight(weight: QuantizedWeight, device: torch.device) -> PackedInteger:
    pack = pack_super_blocks if isinstance(weight.scheme, KQuantScheme) else pack_lookup
    return pack(weight, device)


def decode(weight: QuantizedWeight, x: Tensor, plan: DecodePlan, device: torch.device) -> Tensor:
    layer = DecodeLinear(packed_weight(weight, device), None, x.dtype, lambda shape, tokens: plan)
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=device)
    layer(x.to(device), out)
    return out.cpu()


def relative_error(found: Tensor, x: Tensor, weight: QuantizedWeight) -> float:
    expected = x.double() @ weight.dequantize(torch.float64).T
    return float((found.cpu().double() - expected).norm() / expected.norm())


def batch_tolerance(x: Tensor, weight: QuantizedWeight) -> float:
    rounded = x.double() @ weight.dequantize(x.dtype).double().T
    error = relative_error(rounded.to(x.dtype), x, weight)
    return max(TOLERANCE[x.dtype], BATCH_FACTOR * error)


def columns_of(name: str, odd: int) -> int:
    """Super-blocks and blocks that run over rows have whole ones in a row."""
    return odd if not name.startswith("q") and "flat" not in name and "nested" not in name else -(-odd // 256) * 256


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_decode_kernel_multiplies_every_format(name: str, dtype: torch.dtype, device: torch.device) -> None:
    weight = any_weight(SCHEMES[name], 70, columns_of(name, 301))
    x = torch.randn(3, weight.shape[1]).to(dtype)
    error = relative_error(decode(weight, x, DecodePlan(1, 2, 1, 2, 2), device), x, weight)
    assert error < TOLERANCE[dtype], f"{error:.2e}"


@pytest.mark.parametrize("tokens", [1, 16, 33])
@pytest.mark.parametrize("name", ["nvfp4", "q6_k"])
def test_the_decode_kernel_multiplies_any_number_of_tokens(name: str, tokens: int, device: torch.device) -> None:
    weight = any_weight(SCHEMES[name], 64, 256)
    x = torch.randn(tokens, 256).bfloat16()
    plan = DecodePlan(1, 1, 2, 1, 2, unit_chunks=1, part_tiles=2)
    error = relative_error(decode(weight, x, plan, device), x, weight)
    assert error < TOLERANCE[torch.bfloat16], f"{error:.2e}"


@pytest.mark.parametrize(("name", "dtype"), [case for case in CASES if case[0] not in SAME_KERNELS])
def test_the_mma_kernel_multiplies_every_format(name: str, dtype: torch.dtype, device: torch.device) -> None:
    weight = any_weight(SCHEMES[name], 70, columns_of(name, 136))
    x, packed = torch.randn(5, weight.shape[1]).to(dtype), packed_weight(weight, device)
    out = torch.full((5, 70), torch.nan, dtype=dtype, device=device)
    mma_multiply(packed, x.to(device), None, MmaTile(16, stages=3), scale_exponent(packed, dtype), out)
    error, tolerance = relative_error(out, x, weight), batch_tolerance(x, weight)
    assert error < tolerance, f"{error:.2e} must be below {tolerance:.2e}"


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "q4_k", "q6_k"])
def test_the_wgmma_kernel_multiplies_every_kind(name: str, device: torch.device) -> None:
    weight = any_weight(SCHEMES[name], 130, columns_of(name, 136))
    x, packed = torch.randn(9, weight.shape[1]).bfloat16(), packed_weight(weight, device)
    out = torch.full((9, 130), torch.nan, dtype=x.dtype, device=device)
    wgmma_multiply(packed, x.to(device), None, WgmmaTile(16, warpgroups=1, stages=2), out=out, multiprocessors=3)
    error, tolerance = relative_error(out, x, weight), batch_tolerance(x, weight)
    assert error < tolerance, f"{error:.2e} must be below {tolerance:.2e}"


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_products_of_four_bit_floats_and_their_scales_are_exact(name: str, device: torch.device) -> None:
    weight = any_weight(SCHEMES[name], 64, 128)
    if name == "nvfp4":
        weight = QuantizedWeight(
            weight.scheme, {**weight.tensors, "global_scale": torch.tensor(0.5).double()}, (64, 128)
        )
    x, packed = torch.eye(128).bfloat16(), packed_weight(weight, device)
    out = torch.full((128, 64), torch.nan, dtype=x.dtype, device=device)
    mma_multiply(packed, x.to(device), None, MmaTile(32, stages=2), out=out)
    assert torch.equal(out.cpu().T, weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize(("dtype", "special"), [(torch.float8_e8m0fnu, (0, 255)), (torch.float8_e4m3fn, (127, 0x88))])
def test_rare_scales_are_what_they_are(dtype: torch.dtype, special: tuple[int, int], device: torch.device) -> None:
    scheme = SCHEMES["mxfp4" if dtype == torch.float8_e8m0fnu else "nvfp4"]
    weight = any_weight(scheme, 64, 128)
    codes, scales = weight["codes"].clone(), weight["scales"].view(torch.uint8).clone()
    scales[3, 0], scales[5, 1] = special
    codes[[3, 5]] = 1
    weight = QuantizedWeight(scheme, {**weight.tensors, "codes": codes, "scales": scales.view(dtype)}, weight.shape)
    x = torch.randn(2, 128).bfloat16()
    found, expected = decode(weight, x, DecodePlan(1, 1, 1, 1, 2), device), x.float() @ weight.dequantize().T
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_token_breaks_no_other(value: float, device: torch.device) -> None:
    weight, plan = any_weight(SCHEMES["nf4"], 64, 128), DecodePlan(1, 1, 1, 1, 2)
    x = torch.randn(4, 128).bfloat16()
    clean = decode(weight, x, plan, device)
    x[2, 77] = value
    broken = decode(weight, x, plan, device)
    assert not broken[2].isfinite().any()
    assert torch.equal(broken[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 100, 300, 1000])
@pytest.mark.parametrize("name", SCHEMES)
def test_layers_multiply_any_number_of_tokens(name: str, tokens: int) -> None:
    if reason := obstacle():
        pytest.skip(reason)
    weight = any_weight(SCHEMES[name], 203, columns_of(name, 1000)).to(torch.device("cuda"))
    dtype = torch.float16 if tokens % 2 else torch.bfloat16
    x = torch.randn(tokens, weight.shape[1], device="cuda").to(dtype)
    layer = CudaLookupLinear(weight, None, dtype)
    out = layer(x)
    on_cpu = weight.to(torch.device("cpu"))
    error, tolerance = relative_error(out, x.cpu(), on_cpu), batch_tolerance(x.cpu(), on_cpu)
    assert error < tolerance, f"{error:.2e} must be below {tolerance:.2e}"
    assert torch.equal(layer(x), out)
    x[tokens // 2, 7] = torch.nan
    broken = layer(x)
    assert broken[tokens // 2].isnan().all()
    broken[tokens // 2] = out[tokens // 2]
    assert torch.equal(broken, out)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 48])
@pytest.mark.parametrize("name", ["nf4", "q4_k"])
def test_layers_are_captured_in_graphs(name: str, tokens: int) -> None:
    if reason := obstacle():
        pytest.skip(reason)
    weight = any_weight(SCHEMES[name], 256, 1024)
    layer = CudaLookupLinear(weight, None, torch.bfloat16)
    x = torch.randn(tokens, 1024, device="cuda").to(torch.bfloat16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    x.copy_(torch.randn(tokens, 1024, device="cuda"))
    graph.replay()
    assert torch.equal(captured, layer(x))


def test_blocks_that_cross_rows_are_cut() -> None:
    weight = any_weight(LookupScheme("nf4", 64, "float", flattened=True), 6, 80)
    packed = pack_lookup(weight)
    assert (packed.group_size, packed.columns) == (16, None)


@pytest.mark.parametrize(
    "scheme",
    [
        LookupScheme("nf4", 64, "float", flattened=True),
        LookupScheme("e2m1", 16, "e4m3", activations=ActivationScheme("float", bits=4)),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_multiply_is_refused(scheme: LookupScheme) -> None:
    with pytest.raises(UsageError, match="cannot pack a weight"):
        pack_lookup(any_weight(scheme, 4, 72))


def test_packed_codes_survive() -> None:
    codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
    weight = any_weight(SCHEMES["nf4"], 64, 128)
    weight = QuantizedWeight(weight.scheme, {**weight.tensors, "codes": codes}, (64, 128))
    assert torch.equal(unpack_lookup_codes(pack_lookup(weight).codes), pack_codes(codes, 4, 0, None, 128))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "q4_k", "q6_k"])
def test_packed_weights_take_no_more_memory_than_their_format(name: str) -> None:
    weight = any_weight(SCHEMES[name], 64, 512)
    assert pack_bits(weight) <= weight.num_bits * 1.03


def pack_bits(weight: QuantizedWeight) -> int:
    return packed_weight(weight, torch.device("cpu")).num_bytes * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", ["nf4", "fp4", "e2m1", "iq4_nl"])
def test_tables_lose_less_than_by_rounding(table: TableName, dtype: torch.dtype) -> None:
    values = torch.tensor(TABLES[table]).double()
    found = rounded_table(table, dtype).double() / table_factor(table, dtype)
    assert (found - values).norm() <= 0.6 * (values.to(dtype).double() - values).norm()
    assert table == "nf4" or torch.allclose(found, values, rtol=1e-7, atol=0)
