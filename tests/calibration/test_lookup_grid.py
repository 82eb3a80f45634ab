"""Scales and codes of lookup schemes: equal to the libraries' own where they are plain, and better where searched."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from aphroquant.calibration import gptq, lookup_grid, rtn
from aphroquant.calibration.lookup_blocks import join_blocks, split_blocks
from aphroquant.calibration.lookup_scales import dynamic_map, nest, roomy_global
from aphroquant.calibration.solution import quadratic_form
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.errors import InputError
from aphroquant.schemes import TABLES, ActivationScheme, LookupScheme, QuantizedWeight
from aphroquant.schemes.tables import table_of

NF4 = LookupScheme("nf4", 64, "float", flattened=True)
NF4_DOUBLE = LookupScheme("nf4", 64, "nested", flattened=True)
FP4 = LookupScheme("fp4", 64, "float", flattened=True)
NVFP4 = LookupScheme("e2m1", 16, "e4m3")
MXFP4 = LookupScheme("e2m1", 32, "e8m0")
SCHEMES = (NF4, NF4_DOUBLE, FP4, NVFP4, MXFP4)
SHAPES = ((32, 64), (7, 96), (1, 128), (5, 33))


def statistics(width: int, *, seed: int = 0) -> InputStatistics:
    """Of inputs with correlations and very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x *= torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    moment = x.T @ x / 500
    return InputStatistics(500, moment.diagonal().clone(), x.abs().mean(0), x.abs().amax(0), moment)


def plain(weight: Tensor, scheme: LookupScheme) -> QuantizedWeight:
    return rtn.solve([weight], None, scheme, torch.float16)[0].weight


def weighted_error(weight: Tensor, found: QuantizedWeight, importance: Tensor) -> float:
    return float(((found.dequantize() - weight).square() * importance).sum(dtype=torch.float64))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_split_and_joined_without_a_change(scheme: LookupScheme, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    assert torch.equal(join_blocks(split_blocks(weight, scheme), scheme, shape), weight)


@pytest.mark.parametrize("name", TABLES)
def test_every_entry_of_a_table_is_nearest_to_itself(name: Any) -> None:
    table = table_of(name, torch.device("cpu"))
    found = table.values[torch.bucketize(table.values, table.boundaries)]
    assert torch.equal(found, table.values)
    assert {TABLES[name][int(code)] for code in table.codes} == set(TABLES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 96), (7, 33), (5, 64)], ids=str)
def test_plain_codes_and_scales_are_those_of_bitsandbytes(
    kind: Literal["nf4", "fp4"], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    library = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, dtype=dtype)
    weight[min(2, shape[0] - 1)] = 0
    packed, state = library.quantize_4bit(weight, blocksize=64, quant_type=kind)
    found = plain(weight, LookupScheme(kind, 64, "float", flattened=True))
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: weight.numel()]
    assert torch.equal(found["codes"].flatten(), theirs)
    whole = weight.numel() // 64  # of a zero block cut short by the end, the library stores 1e-38
    assert torch.equal(found["scales"][:whole], state.absmax[:whole])


def test_double_quantized_scales_are_those_of_bitsandbytes() -> None:
    library = pytest.importorskip("bitsandbytes.functional")
    absmax = torch.rand(3000) + 0.5
    theirs, state = library.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    found = nest(absmax)
    assert torch.equal(dynamic_map(), state.code)
    assert torch.equal(found["nested_scales"], state.absmax)
    centred = absmax - found["nested_offset"]
    ours_error, their_error = (
        (dynamic_map()[codes.int()] * found["nested_scales"].repeat_interleave(256)[:3000] - centred).abs()
        for codes in (found["scales"], theirs)
    )
    differing = (found["scales"] != theirs).sum()
    assert differing <= 30  # its compiled quantizer takes the second nearest now and then; its other ones do not
    assert bool((ours_error <= their_error + 1e-7).all())


def compressed_tensors_weight(weight: Tensor, scheme: LookupScheme) -> tuple[Tensor, Tensor]:
    """(scales, decoded weight) as compressed-tensors makes them."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    is_nvfp4 = scheme.scales == "e4m3"
    arguments = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group" if is_nvfp4 else "group",
        group_size=scheme.block_size,
        scale_dtype=torch.float8_e4m3fn if is_nvfp4 else torch.uint8,
    )
    common = generate_gparam(weight.min(), weight.max()) if is_nvfp4 else None
    blocks = weight.view(weight.shape[0], -1, scheme.block_size)
    scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, global_scale=common)
    if is_nvfp4:
        scales = scales.to(torch.float8_e4m3fn).float()
    codes = quantize(weight, scales, None, arguments, global_scale=common)
    return scales, dequantize(codes, scales, None, arguments, global_scale=common)


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=str)
def test_plain_weights_are_those_of_compressed_tensors(scheme: LookupScheme) -> None:
    weight = torch.randn(64, 128) * torch.rand(64, 1)
    scales, decoded = compressed_tensors_weight(weight, scheme)
    found = plain(weight, scheme)
    assert torch.equal(found["scales"].float(), scales)
    assert torch.equal(found.dequantize(), decoded)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_searched_scales_err_less_by_the_importance(scheme: LookupScheme, shape: tuple[int, int]) -> None:
    weight, seen = torch.randn(shape), statistics(shape[1])
    found = rtn.solve([weight], seen, scheme, torch.float16)[0].weight
    found.check("layer")
    searched, whole = (weighted_error(weight, own, seen.mean_square) for own in (found, plain(weight, scheme)))
    assert searched <= whole * 1.0001


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_error_feedback_lowers_the_error_of_the_output(scheme: LookupScheme) -> None:
    weight, seen = torch.randn(24, 128), statistics(128)
    assert seen.second_moment is not None
    losses = [
        float(
            quadratic_form(
                weight - solver.solve([weight], seen, scheme, torch.float16)[0].weight.dequantize(), seen.second_moment
            ).sum()
        )
        for solver in (rtn, gptq)
    ]
    assert losses[1] < 0.8 * losses[0]


def test_nvfp4_scales_are_the_best_of_all_e4m3_numbers() -> None:
    """Against trying each of the 126 positive numbers in float64."""
    weight, importance = torch.randn(3, 32), torch.rand(32) + 0.1
    (grid,) = lookup_grid.searched_grids([weight], importance, NVFP4)
    found = weighted_error(weight, grid.quantized(grid.nearest(weight)), importance)
    numbers = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scales = numbers * roomy_global(weight.abs().max())
    table = torch.tensor(TABLES["e2m1"], dtype=torch.float64)
    points = scales[:, None] * table  # [126, 16]
    blocks = weight.double().view(-1, 1, 16, 1)
    nearest = (blocks - points[:, None]).square().amin(-1)  # [B, 126, 16]
    least = (
        (nearest * importance.double().view(1, 2, 1, 16).expand(3, -1, -1, -1).reshape(6, 1, 16)).sum(-1).amin(1).sum()
    )
    assert found == pytest.approx(float(least), rel=1e-3)


def test_layers_that_share_an_input_share_the_global_scale() -> None:
    weights, seen = [torch.randn(8, 64), 5 * torch.randn(4, 64)], statistics(64)
    for given in (None, seen):
        first, second = rtn.solve(weights, given, NVFP4, torch.float16)
        assert torch.equal(first.weight["global_scale"], second.weight["global_scale"])


def test_the_searched_global_scale_is_exact_as_a_factor_and_as_a_divisor() -> None:
    (solution,) = rtn.solve([torch.randn(8, 64)], statistics(64), NVFP4, torch.float16)
    scale = solution.weight["global_scale"]
    assert float(scale.float()) * float((1 / scale).float()) == 1.0


def test_input_scales_of_four_bit_inputs_cover_what_was_seen() -> None:
    scheme = LookupScheme(
        "e2m1", 16, "e4m3", activations=ActivationScheme("float", 4, granularity="group", group_size=16)
    )
    seen = statistics(64)
    found = rtn.solve([torch.randn(8, 64)], seen, scheme, torch.float16)[0].weight
    found.check("layer")
    reach = float(found["input_scale"]) * 6 * 448
    assert float(seen.max_abs.max()) <= reach < 2 * float(seen.max_abs.max())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_weights_of_extreme_sizes_become_finite_numbers(scheme: LookupScheme, size: float) -> None:
    weight, seen = torch.randn(8, 64) * size, statistics(64)
    for solver, given in ((rtn, None), (rtn, seen), (gptq, seen)):
        found = solver.solve([weight], given, scheme, torch.float16)[0].weight.dequantize()
        assert bool(torch.isfinite(found).all())
        assert float((found - weight).abs().max()) <= 0.6 * size * 4


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_that_are_not_finite_are_an_error(scheme: LookupScheme) -> None:
    weight = torch.ones(4, 64)
    weight[1, 2] = float("nan")
    for given in (None, statistics(64)):
        with pytest.raises(InputError, match="not finite"):
            rtn.solve([weight], given, scheme, torch.float16)


def test_codes_of_several_weights_are_those_of_each_alone() -> None:
    weights, seen = [torch.randn(8, 64), torch.randn(4, 64)], statistics(64)
    together = gptq.solve(weights, seen, MXFP4, torch.float16)
    for weight, solution in zip(weights, together, strict=True):
        alone = gptq.solve([weight], seen, MXFP4, torch.float16)[0]
        assert torch.equal(alone.weight["codes"], solution.weight["codes"])
