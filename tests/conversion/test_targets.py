"""What is asked for, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.targets import needs_calibration, resolve_scheme, resolve_solver, scheme_names
from aphroquant.errors import UsageError
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


@pytest.mark.parametrize("to", ["awq", "gptq", "fp8", "compressed-tensors"])
def test_every_listed_scheme_resolves(to: str) -> None:
    for name in scheme_names(to):
        assert isinstance(resolve_scheme(asked(to, scheme=name), WIDE), IntegerScheme | FloatScheme)


def test_the_default_solver_depends_on_the_bits_and_the_samples() -> None:
    four, eight = IntegerScheme(4, 64, False), IntegerScheme(8, 64, False)
    assert resolve_solver(asked("awq"), four).name == "awq-gptq"
    assert resolve_solver(asked("gptq"), eight).name == "rtn"
    assert resolve_solver(asked("gptq", samples=0), four).name == "rtn"


def test_solvers_that_need_data_refuse_to_go_without() -> None:
    with pytest.raises(UsageError, match="solver gptq needs calibration, but samples = 0"):
        resolve_solver(asked("gptq", samples=0, solver="gptq"), IntegerScheme(4, 64, False))


def test_integer_solvers_do_not_make_fp8() -> None:
    with pytest.raises(UsageError, match="solver awq makes integer codes, not FP8"):
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
