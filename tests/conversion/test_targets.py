"""What is asked for, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aphroquant.calibration.solvers import SOLVERS
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.targets import needs_calibration, resolve_scheme, resolve_solver, scheme_names
from aphroquant.errors import UsageError
from aphroquant.formats import format_class
from aphroquant.schemes import FloatScheme, IntegerScheme

SMOLLM = {"model.layers.0.self_attn.q_proj": 576, "model.layers.0.mlp.down_proj": 1536}
WIDE = {"model.layers.0.self_attn.q_proj": 4096}


def asked(to: str, **options: Any) -> ConversionRequest:
    return ConversionRequest("source", to, Path("out"), **options)


@pytest.mark.parametrize(
    ("widths", "expected"), [(WIDE, 128), (SMOLLM, 64), ({"a": 96}, 32), ({"a": 96, "b": 64}, 32), ({"a": 50}, None)]
)
def test_the_automatic_group_size_is_the_largest_that_fits_kernels_and_layers(
    widths: dict[str, int], expected: int | None
) -> None:
    assert resolve_scheme(asked("awq"), widths) == IntegerScheme(4, expected, False)


def test_a_group_size_that_does_not_divide_names_the_layer_and_those_that_do() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_scheme(asked("gptq", group_size=128), SMOLLM)
    assert caught.value.message == (
        "model.layers.0.self_attn.q_proj: in_features = 576 must be divisible by group_size = 128"
    )
    assert caught.value.hint == "--group-size 32, 64, 96, 192 fit all layers, and -1 (one group a row)"


def test_minus_one_is_one_group_a_row() -> None:
    assert resolve_scheme(asked("gptq", group_size=-1, bits=3, symmetric=True), SMOLLM) == IntegerScheme(3, None, True)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("awq", {"bits": 3}, "awq holds 4 bits, not 3"),
        ("gptq", {"bits": 5}, "gptq holds 2 or 3 or 4 or 8 bits, not 5"),
        ("fp8", {"bits": 4}, "--bits does not go with the scheme fp8-dynamic"),
        ("fp8", {"group_size": 64}, "--group-size does not go with the scheme"),
        ("fp8", {"scheme": "w4a16"}, "fp8 has no scheme 'w4a16'"),
        ("compressed-tensors", {"scheme": "w8a16", "bits": 4}, "--scheme w8a16 has 8 bits, but --bits 4"),
        ("compressed-tensors", {"scheme": "w8a8-int8", "group_size": 64}, "--group-size does not go"),
    ],
)
def test_what_a_target_cannot_hold_is_refused(to: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_scheme(asked(to, **options), WIDE)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("to", ["awq", "gptq", "fp8", "compressed-tensors", "modelopt", "bitsandbytes", "hqq"])
def test_every_listed_scheme_has_a_solver_and_a_place(to: str) -> None:
    for name in scheme_names(to):
        scheme = resolve_scheme(asked(to, scheme=name), WIDE)
        solver = resolve_solver(asked(to, scheme=name), scheme)
        assert solver.obstacle(scheme) is None
        assert format_class(to).for_schemes({"model.layers.0.self_attn.q_proj": scheme}, [])


@pytest.mark.parametrize(
    ("to", "options", "expected"),
    [
        ("bitsandbytes", {"bits": 4}, "nf4 g64 flat"),
        ("bitsandbytes", {"scheme": "nf4-dq", "group_size": 128}, "nf4 g128 double-quantized flat"),
        ("bitsandbytes", {}, "int8 sym channel"),
        ("modelopt", {"bits": 4}, "e2m1 g16 e4m3 x float4 inputs"),
        ("hqq", {"solver": "hqq", "group_size": 64}, "int4 real zeros g64"),
        ("hqq", {"group_size": 64}, "int4 asym g64"),
    ],
)
def test_bits_sizes_and_solvers_choose_among_the_schemes_of_a_target(
    to: str, options: dict[str, Any], expected: str
) -> None:
    assert str(resolve_scheme(asked(to, **options), WIDE)) == expected


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("bitsandbytes", {"scheme": "nf4", "group_size": 48}, "the blocks of bitsandbytes are 32, 64"),
        ("bitsandbytes", {"scheme": "nf4", "bits": 8}, "--bits does not go with the scheme nf4"),
        ("compressed-tensors", {"scheme": "nvfp4", "group_size": 32}, "--group-size does not go with the scheme nvfp4"),
        ("hqq", {"solver": "hqq", "symmetric": True}, "solver hqq finds zero points"),
    ],
)
def test_settings_that_a_scheme_fixes_are_refused(to: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_scheme(asked(to, **options), WIDE)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        (
            "compressed-tensors",
            {"scheme": "nvfp4a16", "solver": "smoothquant"},
            "solver smoothquant is about the rounding",
        ),
        (
            "compressed-tensors",
            {"scheme": "w8a8-int8", "solver": "hqq"},
            "solver hqq finds zero points, which int8 sym",
        ),
        ("bitsandbytes", {"scheme": "nf4", "solver": "aqlm"}, "solver aqlm makes sums of codebook vectors, not nf4"),
    ],
)
def test_solvers_refuse_schemes_that_they_are_not_for(to: str, options: dict[str, Any], message: str) -> None:
    request = asked(to, **options)
    with pytest.raises(UsageError, match=message):
        resolve_solver(request, resolve_scheme(request, WIDE))


def test_inputs_of_eight_bits_are_smoothed_where_there_is_data() -> None:
    scheme = resolve_scheme(asked("compressed-tensors", scheme="w8a8-int8"), WIDE)
    assert resolve_solver(asked("compressed-tensors"), scheme).name == "smoothquant"
    assert resolve_solver(asked("compressed-tensors", samples=0), scheme).name == "rtn"


def test_the_default_solver_depends_on_the_bits_and_the_samples() -> None:
    four, eight = IntegerScheme(4, 64, False), IntegerScheme(8, 64, False)
    assert resolve_solver(asked("awq"), four).name == "awq-gptq"
    assert resolve_solver(asked("gptq"), eight).name == "rtn"
    assert resolve_solver(asked("gptq", samples=0), four).name == "rtn"
    for bits in (2, 3):
        few = IntegerScheme(bits, 64, False)
        assert resolve_solver(asked("gptq"), few).name == "awq-gptaq"
        assert resolve_solver(asked("gptq", effort="best"), few).name == "awq-gptq"
        assert resolve_solver(asked("gptq", samples=0), few).name == "rtn"


def test_solvers_that_need_data_refuse_to_go_without() -> None:
    with pytest.raises(UsageError, match="solver gptq needs calibration, but samples = 0"):
        resolve_solver(asked("gptq", samples=0, solver="gptq"), IntegerScheme(4, 64, False))


def test_integer_solvers_do_not_make_fp8() -> None:
    with pytest.raises(UsageError, match="solver awq makes integer codes and codes into tables, not fp8 per tensor"):
        resolve_solver(asked("fp8", solver="awq"), FloatScheme("tensor"))
    with pytest.raises(UsageError, match="unknown solver"):
        resolve_solver(asked("fp8", solver="magic"), FloatScheme("tensor"))


def test_only_what_looks_at_activations_needs_calibration() -> None:
    solver = resolve_solver(asked("gptq", solver="rtn"), IntegerScheme(4, 64, False))
    assert needs_calibration(IntegerScheme(4, 64, False), solver, 128)
    assert not needs_calibration(IntegerScheme(8, 64, False), solver, 128)
    assert not needs_calibration(IntegerScheme(4, 64, False), solver, 0)
    static = resolve_scheme(asked("fp8", scheme="fp8-static"), WIDE)
    dynamic = resolve_scheme(asked("fp8"), WIDE)
    assert isinstance(static, FloatScheme)
    assert isinstance(dynamic, FloatScheme)
    assert needs_calibration(static, solver, 128)
    assert not needs_calibration(dynamic, solver, 128)
    assert needs_calibration(dynamic, SOLVERS["gptq"], 128)
    assert not needs_calibration(IntegerScheme(4, 64, False), SOLVERS["mse"], 128)
    nvfp4 = resolve_scheme(asked("compressed-tensors", scheme="nvfp4"), WIDE)
    assert needs_calibration(nvfp4, SOLVERS["mse"], 0)  # its inputs have a scale of the whole tensor


@pytest.mark.parametrize(
    "options", [{"bits": 9}, {"group_size": 0}, {"samples": -1}, {"seq_len": 1}, {"seed": -1}, {"seed": 2**63}]
)
def test_nonsense_values_are_usage_errors(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        asked("awq", **options)


@pytest.mark.parametrize(("target", "symmetric"), [("awq", False), ("gptq", False), ("compressed-tensors", True)])
def test_zero_points_are_used_by_default_where_other_readers_run_them(target: str, symmetric: bool) -> None:
    by_default = resolve_scheme(asked(target, bits=4), SMOLLM)
    other = resolve_scheme(asked(target, bits=4, symmetric=not symmetric), SMOLLM)
    assert isinstance(by_default, IntegerScheme)
    assert isinstance(other, IntegerScheme)
    assert (by_default.symmetric, other.symmetric) == (symmetric, not symmetric)
